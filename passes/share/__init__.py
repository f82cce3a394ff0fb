"""Passes that let weights take shared values, and constants share one storage."""
