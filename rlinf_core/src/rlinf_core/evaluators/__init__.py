"""The evaluators that core brings."""
