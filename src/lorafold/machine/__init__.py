"""This machine: its devices, its free memory, its allocator, and environment variables that make
training faster.
"""
