"""Loads the run's config from TOML and overrides. Importing it leaves torch unloaded."""
