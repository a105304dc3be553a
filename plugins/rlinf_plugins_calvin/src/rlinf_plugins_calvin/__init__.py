"""CALVIN for rlinf-core: how often a policy succeeds in simulation."""
