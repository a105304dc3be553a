"""Processes, devices, and the rendezvous of a run's ranks."""
