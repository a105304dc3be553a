"""The policy's module: a causal language model with its attention, loss and generation."""
