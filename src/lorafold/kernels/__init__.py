"""Faster implementations of operations, by kind of device (`registry`). C++ code is compiled on
first use and cached; without a compiler, the operations run in torch.
"""
