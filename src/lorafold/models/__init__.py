"""Loading of base models and tokenizers, model files, fingerprints and quantization."""
