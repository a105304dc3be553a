"""The parts of `benchmarks/data_loading.py`: the datasets it reads, and loaders that take turns."""
