"""The questions of `benchmarks/gpu_probe.py`."""
