"""`rlinf new-plugin`: a dataset format proposed from a dataset's metadata."""
