"""Environments of Gymnasium for rlinf-core."""
