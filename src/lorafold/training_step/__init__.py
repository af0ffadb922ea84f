"""A training step: losses, attention over packed documents, fused modules, optimizer, sharding."""
