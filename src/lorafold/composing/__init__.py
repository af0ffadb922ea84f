"""One adapter from many, and what their tasks do to each other."""
