"""The policy: attention, loss and generation around a causal language model of transformers."""
