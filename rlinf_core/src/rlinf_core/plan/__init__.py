"""What a run will take, for `rlinf plan`: samples.py finds sizes, step.py counts, advice.py says what to change."""
