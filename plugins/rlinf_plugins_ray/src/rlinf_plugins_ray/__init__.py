"""Starts runs of rlinf-core on an existing Ray cluster."""
