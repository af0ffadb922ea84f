"""Files and directories that lorafold writes: atomic directories, records, model cards, HTML pages.
"""
