"""What is wrong with a dataset on disk."""
