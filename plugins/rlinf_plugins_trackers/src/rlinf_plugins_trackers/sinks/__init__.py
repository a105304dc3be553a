"""A run of each tracker; each module imports its library when it is used."""
