"""Figures of an adapter's update: its spectrum, its relation to the base, the tokens that it reads
and writes, the loss along lines in weight space.
"""
