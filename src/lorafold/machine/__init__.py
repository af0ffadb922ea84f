"""The machine at hand: its devices, free memory, allocator, and the environment that suits
training.
"""
