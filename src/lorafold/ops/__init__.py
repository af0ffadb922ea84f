"""Fused tensor operations, independent of any model. Their reference implementations are in
`tests/lib/reference_ops.py`.
"""
