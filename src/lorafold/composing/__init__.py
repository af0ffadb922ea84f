"""Composes several adapters into one, and measures the interference between their tasks."""
