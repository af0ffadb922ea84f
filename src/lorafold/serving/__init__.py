"""The server: an OpenAI-compatible API for many tenants and adapters of one base model."""
