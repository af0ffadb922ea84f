"""A run: request, loop, checkpoints, objectives, what it shows and leaves."""
