"""Estimates the memory of a training step or of inference, by running it on fake tensors."""
