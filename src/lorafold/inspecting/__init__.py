"""Analysis of adapters: spectra, overlaps, nearest tokens, loss paths, resizing, run history,
intrinsic dimension.
"""
