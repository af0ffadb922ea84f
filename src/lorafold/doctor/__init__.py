"""What this machine and this installation are, what is wrong with them, and what would be slow."""
