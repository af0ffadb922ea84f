"""Reads and writes adapters as directories in PEFT's format, by one table of methods."""
