"""What is beside published weights, and in a folder that has none: where a run's weights come from."""
