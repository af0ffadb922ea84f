"""The public functions, such as `lf.train`: they take names, paths, rows or a loaded model, and
return frozen dataclasses. The commands of `lorafold.cli` call them.
"""
