"""Folding an adapter into the base's weights: the plan, its execution in memory, and rounding."""
