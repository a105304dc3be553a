"""Checkpoints: written while training continues, verified and loaded."""
