"""Merging adapters into the base's weights: the plan, its execution in memory, and rounding."""
