"""Processes, devices, and how the ranks of a run meet."""
