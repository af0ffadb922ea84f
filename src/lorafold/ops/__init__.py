"""Fused tensor operations, which know no model; `tests/lib/reference_ops.py` specifies them."""
