"""What a plugin sees: hooks, the config bases and protocols, and the schema of a run's config."""
