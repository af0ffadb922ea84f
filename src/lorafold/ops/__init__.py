"""Fused tensor operations, which know no model. `reference` and `nf4` are their specifications."""
