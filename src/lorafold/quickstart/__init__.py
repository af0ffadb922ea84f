"""The whole story on the embedded model, and the task that it learns."""
