"""The recipe: every choice of a run in one record, read from files and options, and completed for a
method, a model's files and an adapter to start from.
"""
