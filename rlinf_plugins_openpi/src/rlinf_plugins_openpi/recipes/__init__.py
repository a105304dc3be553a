"""Recipes of other projects as configs: `rlinf import-rlinf`."""
