"""Adapters as directories in PEFT's format, both ways: one table of methods."""
