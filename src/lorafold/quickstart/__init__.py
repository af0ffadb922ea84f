"""The quickstart on the embedded model."""
