"""The recipe of a run: its fields, its parsing, and its completion for a method, model and adapter.
"""
