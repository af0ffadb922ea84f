"""Deltas for token rows, whole modules, biases, virtual tokens and mixtures; checks of options."""
