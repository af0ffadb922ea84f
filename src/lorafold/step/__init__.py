"""What one training step computes: recipe, losses, packed attention, fused parts, optimizer."""
