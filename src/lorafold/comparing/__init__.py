"""Comparison of methods on the same model and data."""
