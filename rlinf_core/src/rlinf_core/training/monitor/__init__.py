"""What is watched, measured and reported while a run trains."""
