"""Fused tensor operations, independent of any model; `tests/lib/reference_ops.py` specifies them.
"""
