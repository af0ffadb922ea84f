"""Faster implementations of operations by kind of device (`registry`). C++ ones are compiled on
first use and cached; without a compiler, torch computes the same.
"""
