"""This machine: its devices, its free memory, its allocator, processes that work beside this one,
and environment variables that make training faster.
"""
