"""Base models by name, by storage, in files, or as fake models; tokenizers and fingerprints."""
