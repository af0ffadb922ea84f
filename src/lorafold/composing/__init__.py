"""Composing several adapters into one, and measuring the interference between their tasks."""
