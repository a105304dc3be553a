"""Frames of videos, and images in files and parquet columns."""
