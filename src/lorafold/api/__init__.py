"""The functions of the public API, such as `lf.train`. They accept names, paths, rows or a loaded
model. The commands of `lorafold.cli` call them.
"""
