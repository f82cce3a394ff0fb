"""Everything that runs a model: sessions, feeds, comparison, checks, measurement and reports."""
