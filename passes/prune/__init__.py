"""Pruning passes: weights that matter little become zero."""
