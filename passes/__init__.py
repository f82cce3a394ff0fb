"""The passes: ``base`` says what one is, ``pipeline`` runs them, and each folder holds one family."""
