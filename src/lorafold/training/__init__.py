"""A training run: its request, setup, loop, checkpoints and objectives, its display and result."""
