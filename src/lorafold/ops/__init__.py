"""Tensor operations, fused; `reference` and `nf4` are their specifications. No model is known here.
"""
