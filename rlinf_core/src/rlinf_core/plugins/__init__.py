"""Finds plugins, loads them, calls their hooks, and keeps what failed."""
