"""A user's rows, to conversations, to tokens, to batches."""
