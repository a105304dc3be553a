"""Linear layers with openpi's LoRA. Torch and the standard library only; the axes are those of `layout`.

It differs from the usual LoRA in that queries, keys and values have a pair of matrices for each head; that the heads of
the attention's output are summed in A's product, so that B counts as the sum of its heads; and in its initial values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from rlinf_core.lora.layers import LowRank
from rlinf_plugins_openpi.lora.layout import Pair

STD = 0.01
"""Standard deviation of the initial values of A and of B: the reference's default, which its variants keep."""


class OpenpiLoraLinear(nn.Linear):
    """A linear layer with pairs of openpi's LoRA, in the shapes of its JAX parameters.

    Args:
        layer: The layer whose place it takes.
        pairs: The pairs, first rows first.
        modules: Published matrix, by the names of the tables -> the published name of its module.
    """

    kept_for_export = True
    """openpi has adapters in the VLM's last layer, too, where only those of keys and values learn."""

    def __init__(self, layer: nn.Linear, pairs: Sequence[Pair], modules: Mapping[str, str]) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        self.pairs, self.published = tuple(pairs), dict(modules)
        for pair in pairs:
            for name, shape in pair.parameters.items():
                value = torch.empty(shape, dtype=torch.float32, device=layer.weight.device)
                self.register_parameter(name, nn.Parameter(value))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., inputs] -> [..., outputs]."""
        changes = [self._change(pair, input) for pair in self.pairs]
        change = torch.cat(changes, dim=-1) if len(changes) > 1 else changes[0]
        return super().forward(input) + change

    def _change(self, pair: Pair, x: torch.Tensor) -> torch.Tensor:
        a, b = getattr(self, f"lora_a_{pair.name}"), getattr(self, f"lora_b_{pair.name}")
        if pair.summed:
            low = x @ a.flatten(0, 1)
            out = low @ b.sum(0)
        else:
            a, b = a.reshape(-1, *a.shape[-2:]), b.reshape(-1, *b.shape[-2:])
            low = F.linear(x, a.transpose(1, 2).flatten(0, 1))
            low = low.view(*low.shape[:-1], len(a), -1)
            out = torch.einsum("...nr,nrh->...nh", low, b).flatten(-2)
        scaled: torch.Tensor = out if pair.scale == 1.0 else pair.scale * out
        return scaled

    def initial_value(self, name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
        """Normal(0.01), also of B: a new adapter changes the policy."""
        return torch.empty(shape, device="cpu").normal_(0.0, STD, generator=generator)

    def low_rank(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, LowRank]:
        """The same changes as the usual LoRA has them; that of a matrix with several pairs has their ranks' sum."""
        out: dict[str, LowRank] = {}
        for pair in self.pairs:
            a, b = tensors[f"lora_a_{pair.name}"], tensors[f"lora_b_{pair.name}"]
            if pair.summed:
                changes = [LowRank(a.flatten(0, 1).t(), b.sum(0).t(), pair.scale)]
            else:
                halves = [one.reshape(len(pair.matrices), -1, *one.shape[-2:]) for one in (a, b)]
                changes = [
                    LowRank(one.transpose(1, 2).flatten(0, 1), _block_diagonal(other.transpose(1, 2)), pair.scale)
                    for one, other in zip(*halves, strict=True)
                ]
            out |= {self.published[name]: change for name, change in zip(pair.matrices, changes, strict=True)}
        return out

    def merged(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The weight with all changes; products are computed in float64."""
        weight = tensors["weight"].clone()
        changes = self.low_rank({name: tensor.double() for name, tensor in tensors.items()})
        for pair in self.pairs:
            row = pair.first
            for name in pair.matrices:
                a, b, scale = changes[self.published[name]]
                weight[row : row + len(b)] += (scale * (b @ a)).to(weight.dtype)
                row += len(b)
        return {"weight": weight}


def _block_diagonal(blocks: torch.Tensor) -> torch.Tensor:
    whole: torch.Tensor = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
    return whole
