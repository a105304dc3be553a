"""The parts of `benchmarks/data_loading.py`: the datasets it reads, and loaders measured in turns."""
