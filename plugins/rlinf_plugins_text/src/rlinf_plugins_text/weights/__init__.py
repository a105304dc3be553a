"""Pretrained language models: folders and tensors."""
