"""Pretrained weights: read from the layouts of openpi, lerobot and RLinf, written in openpi's PyTorch layout."""
