"""The parts of `benchmarks/infer.py`: one call beside lerobot's, and what a server adds to a call."""
