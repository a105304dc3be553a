"""Predicts a run's cost for `rlinf plan`: samples.py finds sizes, step.py counts, advice.py suggests changes."""
