"""Core's own tables of the config: `[runner]`, `[cluster]` and mixtures in `[data]`."""
