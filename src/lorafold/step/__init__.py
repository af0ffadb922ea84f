"""A training step: recipe, losses, attention over packed documents, fused operations, optimizer."""
