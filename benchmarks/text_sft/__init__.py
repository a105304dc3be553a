"""The parts of `benchmarks/text_step.py`: each side's training in a process of its own, its clock, and its profile."""
