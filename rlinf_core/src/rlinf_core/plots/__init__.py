"""Figures for pages, drawn with matplotlib."""
