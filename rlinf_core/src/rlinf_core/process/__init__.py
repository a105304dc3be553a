"""A process from start to end: its streams, how it ends, and what ends it if it hangs."""
