"""MetaWorld as an environment of rlinf-core."""
