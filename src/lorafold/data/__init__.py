"""Turns rows into conversations, conversations into tokens, and tokens into batches."""
