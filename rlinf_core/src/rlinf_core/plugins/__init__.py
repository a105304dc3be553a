"""Finds and loads plugins, calls their hooks, and records failures."""
