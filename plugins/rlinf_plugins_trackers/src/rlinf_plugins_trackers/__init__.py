"""Experiment trackers for rlinf-core: TensorBoard, Weights & Biases, SwanLab and Trackio."""
