"""The page of `rlinf report`."""
