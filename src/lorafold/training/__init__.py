"""A training run: its request, setup, loop and checkpoints, its display and result."""
