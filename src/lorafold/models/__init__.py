"""Loading base models, their files, tokenizers, fingerprints and quantization."""
