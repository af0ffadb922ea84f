"""Base models: by name, by storage, in their files, or without values; tokenizers, fingerprints."""
