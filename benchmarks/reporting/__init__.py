"""How benchmarks report: `result_line` is the one shape of what they print for programs."""
