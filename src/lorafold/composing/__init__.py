"""One adapter from several, and the interference between their tasks."""
