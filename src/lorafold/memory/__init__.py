"""Estimates of the memory of a training step or of inference, which is run on fake tensors."""
