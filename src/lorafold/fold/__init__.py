"""Folding an adapter into the base's weights: the plan (tied weights, biases, vocabulary and
problems), its execution in memory, and rounding.
"""
