"""Base classes (layer, delta, spec) and the code that attaches, combines and activates adapters."""
