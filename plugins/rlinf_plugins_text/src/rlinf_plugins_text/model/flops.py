"""The operations that a training step on texts needs, however it is implemented: no padding, no recomputation.

A multiply-add counts as two operations, forward and backward together as three forward passes. Every token passes
through the matrices of all layers and attends to itself and the earlier tokens of its text; only positions that
predict a trained token pass through the head.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from rlinf_core.data.sample import Batch
from rlinf_plugins_text.model.language_model import LanguageModel

if TYPE_CHECKING:
    from rlinf_plugins_text.settings import TextPolicySettings

FORWARD_AND_BACKWARD = 3


@dataclass(frozen=True)
class ModelCost:
    """The sizes of a model that determine its cost."""

    matrices: int
    """Elements of the matrices of all layers: multiply-adds per token."""
    head: int
    """Elements of the head's matrix: multiply-adds per trained token."""
    attention: int
    """Layers x query heads x head width: multiply-adds per pair of tokens, once for scores and once for values."""

    @classmethod
    def of(cls, settings: TextPolicySettings) -> ModelCost | None:
        """The sizes of a policy's model; None if they do not determine the cost: experts, windows, no attention."""
        return _cost(settings.model_dump_json(), type(settings))


@functools.lru_cache(maxsize=4)
def _cost(dumped: str, cls: type[TextPolicySettings]) -> ModelCost | None:
    settings = cls.model_validate_json(dumped)
    with torch.device("meta"):
        lm = LanguageModel(settings, keeps_padding=True)
    config, shapes = lm.model.config, [tuple(p.shape) for layer in lm.layers for p in layer.parameters()]
    window = getattr(config, "sliding_window", None)
    heads = getattr(config, "num_attention_heads", 0)
    known = settings.attention == "documents" and heads and not (window and window < settings.max_length)
    if not known or any(len(shape) > 2 for shape in shapes) or "expert" in " ".join(config.to_dict()):
        return None
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    matrices = sum(shape[0] * shape[1] for shape in shapes if len(shape) == 2)
    head = lm.model.get_output_embeddings().weight.numel()
    return ModelCost(matrices, head, len(lm.layers) * heads * width)


def training_flops(cost: ModelCost, batch: Batch) -> float:
    """Operations of the forward and backward pass of a batch.

    Args:
        cost: The model's.
        batch: From `rows.collate.stack`, on the CPU.
    """
    lengths = batch["document_lengths"][:, :-1].double()  # The last column is padding.
    pairs = float((lengths * (lengths + 1) / 2).sum())
    multiplied = cost.matrices * float(lengths.sum()) + cost.head * float(batch["trained"].sum())
    return FORWARD_AND_BACKWARD * 2 * (multiplied + 2 * cost.attention * pairs)
