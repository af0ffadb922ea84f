"""A training run: its request, setup, loop, checkpoints, progress display and result."""
