"""What `benchmarks/real_time.py` plays: a course that can be passed on two sides."""
