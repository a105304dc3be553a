"""Checkpoints: written beside training, verified, loaded."""
