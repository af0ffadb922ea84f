"""What a delta sees (layer), what it is (delta, spec), how it is attached, combined and aimed."""
