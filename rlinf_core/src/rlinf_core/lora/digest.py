"""A digest of the weights that adapters belong to, by which other weights are recognised when adapters are loaded."""

from __future__ import annotations

import hashlib

import torch

SAMPLED = 1024
"""Numbers of each parameter that count: reading all of a large model would take minutes."""


class Digest:
    """Collects published parameters, in any order. bfloat16 counts, so that weights may be held in it."""

    def __init__(self) -> None:
        self._parts: dict[str, str] = {}

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Add a parameter."""
        sample = tensor.detach().flatten()[:SAMPLED].to(device="cpu", dtype=torch.bfloat16).view(torch.int16)
        text = f"{name} {tuple(tensor.shape)} ".encode() + sample.numpy().tobytes()
        self._parts[name] = hashlib.sha256(text).hexdigest()

    def __str__(self) -> str:
        return hashlib.sha256("".join(self._parts[name] for name in sorted(self._parts)).encode()).hexdigest()
