"""The tests of `rlinf triage`: scene.py opens what they look at, builtin.py lists them, chain.py runs them."""
