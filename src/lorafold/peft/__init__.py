"""Reading and writing adapters in PEFT's format, described by one table of methods."""
