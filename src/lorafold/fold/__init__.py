"""Folding an adapter into weights: planned once (ties, biases, vocabulary, refusals), and rounded.
"""
