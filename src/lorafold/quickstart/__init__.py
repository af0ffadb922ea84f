"""The quickstart on the embedded model: its task and its steps."""
