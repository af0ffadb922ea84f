"""Every method on one's own model and data, measured."""
