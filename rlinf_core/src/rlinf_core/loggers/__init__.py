"""The two loggers of every run."""
