"""Faster forms of operations by kind of device (`table`). Those in C++ are compiled for this
processor when they are first needed and kept in the cache; without a compiler torch computes the
same.
"""
