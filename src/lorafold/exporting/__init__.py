"""Exports of adapters and models for other engines, each verified in its engine (`engines/`)."""
