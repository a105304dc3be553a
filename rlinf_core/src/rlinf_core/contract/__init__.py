"""Everything a plugin sees: hooks, config base classes, protocols, and the schema of a run's config."""
