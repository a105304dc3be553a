"""From samples to the model's tensors."""
