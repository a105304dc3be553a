"""The run's config: sections, layers and loading. Importing it leaves torch unloaded."""
