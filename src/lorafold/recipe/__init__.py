"""The recipe of a training run: its fields, parsing, and the resolution of unset fields."""
