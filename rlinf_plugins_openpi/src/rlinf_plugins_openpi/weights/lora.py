"""openpi's JAX parameters with LoRA in them, merged while they are read. Importing this loads no torch.

openpi's trainer writes adapters and base weights into one checkpoint. Beside `…/q_einsum/w` there is
`…/q_einsum/lora_a`, beside `…/mlp/linear` there is `…/mlp/linear_lora_a`. `lora.layout` describes what they change.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rlinf_core import UserError
from rlinf_plugins_openpi.weights.files import TensorFiles

if TYPE_CHECKING:
    import torch

OUTPUT = "attn_vec_einsum"
"""The attention's output, whose heads are summed in B."""


class Scaling(NamedTuple):
    """What checkpoints do not hold: how the attention's adapters are scaled."""

    alphas: Mapping[str, float]
    """Expert (`vlm`, `expert`) -> alpha; missing: the rank, as in openpi's variants."""
    rslora: bool = False

    def factor(self, key: str, rank: int) -> float:
        """The factor of an array's adapter. That of the MLP is 1 whatever alpha is: openpi ignores it there."""
        module = key.removesuffix("/w")
        if module == key:
            return 1.0
        alpha = self.alphas.get("expert" if module.endswith("_1") else "vlm", float(rank))
        return alpha / (math.sqrt(rank) if self.rslora else rank)


class MergedLora:
    """The arrays of a checkpoint with the adapters in them (a `files.TensorFiles`).

    Args:
        files: The arrays, LoRA's included.
        scaling: How they are scaled.

    Raises:
        UserError: An adapter lacks its other half or the array it changes.
    """

    def __init__(self, files: TensorFiles, scaling: Scaling) -> None:
        self._files, self._scaling = files, scaling
        self._adapters: dict[str, tuple[str, str]] = {}
        lost = []
        for key in files.shapes:
            if not is_lora(key):
                continue
            stem = key[: -len("lora_a")]
            base = stem.removesuffix("_") if stem.endswith("_") else f"{stem}w"
            pair = (f"{stem}lora_a", f"{stem}lora_b")
            if base in files.shapes and all(one in files.shapes for one in pair):
                self._adapters[base] = pair
            else:
                lost.append(key)
        if lost:
            raise UserError(f"the checkpoint has {', '.join(lost[:4])} without the array that belongs to it")
        self.shapes = {key: shape for key, shape in files.shapes.items() if not is_lora(key)}
        # The sum is float32, as the adapters are; openpi stores the base in bfloat16, which would round them away.
        self.dtypes = {key: "F32" if key in self._adapters else files.dtypes[key] for key in self.shapes}
        self._last: tuple[str, torch.Tensor] | None = None

    def path_of(self, key: str) -> Path:
        """See `files.TensorFiles`."""
        return self._files.path_of(key)

    def read(self, key: str) -> torch.Tensor:
        """See `files.TensorFiles`."""
        if key not in self._adapters:
            return self._files.read(key)
        if self._last is None or self._last[0] != key:  # Its layers are read one after another.
            self._last = None
            self._last = (key, self._merge(key))
        return self._last[1]

    def _merge(self, key: str) -> torch.Tensor:
        a, b = (self._files.read(one).double() for one in self._adapters[key])
        if OUTPUT in key:
            b = b.sum(-3, keepdim=True)
        factor = self._scaling.factor(key, a.shape[-1])
        merged = self._files.read(key).float()
        for layer, (one, other) in enumerate(zip(a, b, strict=True)):  # All at once would take three times the memory.
            merged[layer] += (factor * (one @ other)).float()
        return merged


def is_lora(key: str) -> bool:
    """Whether an array belongs to LoRA."""
    return key.endswith(("lora_a", "lora_b"))
