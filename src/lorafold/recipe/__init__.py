"""The recipe of a run: fields, parsing, and completion for a method, model and adapter."""
