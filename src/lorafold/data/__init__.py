"""Converts rows to conversations, conversations to tokens, and tokens to batches."""
