"""Merges adapters into the base weights: the plan, its execution in memory, and quantization."""
