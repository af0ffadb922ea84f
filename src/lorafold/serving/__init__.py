"""The server: an OpenAI-compatible API over the engine, for many tenants and adapters on one base.
"""
