"""Turns a user's rows into conversations, the conversations into tokens, and these into batches."""
