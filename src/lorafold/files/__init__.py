"""The files and directories that lorafold writes: atomic directories, records, cards, pages."""
