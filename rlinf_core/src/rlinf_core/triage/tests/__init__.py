"""Core's tests of `rlinf triage`."""
