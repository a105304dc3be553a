"""The two loggers that always run."""
