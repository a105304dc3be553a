"""The parts of `benchmarks/training_step.py`: cases, our training step, the peers' training steps, and timing.

Each side needs its own environment alone: `cases` NumPy, `timing` torch, `ours` those two, and each peer its packages.
"""
