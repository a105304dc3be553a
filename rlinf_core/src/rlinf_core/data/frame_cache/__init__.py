"""Frames decoded once by `rlinf cache`, and read from there."""
