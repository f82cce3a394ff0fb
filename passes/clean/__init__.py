"""Clean-up passes: the same model, said with fewer words."""
