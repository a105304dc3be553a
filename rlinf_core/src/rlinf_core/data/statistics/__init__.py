"""Normalisation statistics: computed, imported, diagnosed."""
