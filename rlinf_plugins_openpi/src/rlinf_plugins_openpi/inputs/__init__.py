"""Turns samples into the model's input tensors."""
