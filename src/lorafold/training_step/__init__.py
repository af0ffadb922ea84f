"""A training step: losses, attention over packed documents, fused operations, optimizer."""
