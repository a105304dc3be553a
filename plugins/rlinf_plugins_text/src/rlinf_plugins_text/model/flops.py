"""How much computing a batch of texts is worth, whatever an implementation does besides: no padding, no recomputation.

Two operations a multiply-add, three times the forward pass. A token meets every matrix of the layers; it attends to
itself and those before it in its text; only what precedes a trained token meets the head.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlinf_core.data.sample import Batch

if TYPE_CHECKING:
    from rlinf_plugins_text.config import TextPolicyConfig

FORWARD_AND_BACKWARD = 3


@dataclass(frozen=True)
class ModelCost:
    """What a model's sizes say of its cost."""

    matrices: int
    """Numbers in the matrices of all layers: multiply-adds of a token."""
    head: int
    """Numbers in the head: multiply-adds of a trained token."""
    attention: int
    """Layers x query heads x their width: multiply-adds of a pair of tokens, once for scores and once for values."""

    @classmethod
    def of(cls, config: TextPolicyConfig) -> ModelCost | None:
        """Those of a policy's model; None where cost does not follow from them: experts, windows, no attention."""
        return _cost(config.model_dump_json(), type(config))


@functools.lru_cache(maxsize=4)
def _cost(config: str, cls: type[TextPolicyConfig]) -> ModelCost | None:
    import torch

    policy = cls.model_validate_json(config)
    with torch.device("meta"):
        lm: Any = policy.build_to_count().lm
    settings, shapes = lm.model.config, [tuple(p.shape) for layer in lm.layers for p in layer.parameters()]
    window = getattr(settings, "sliding_window", None)
    heads = getattr(settings, "num_attention_heads", 0)
    known = policy.attention == "documents" and heads and not (window and window < policy.max_length)
    if not known or any(len(shape) > 2 for shape in shapes) or "expert" in " ".join(settings.to_dict()):
        return None
    width = getattr(settings, "head_dim", None) or settings.hidden_size // heads
    matrices = sum(shape[0] * shape[1] for shape in shapes if len(shape) == 2)
    head = lm.model.get_output_embeddings().weight.numel()
    return ModelCost(matrices, head, len(lm.layers) * heads * width)


def training_flops(cost: ModelCost, batch: Batch) -> float:
    """Operations of a batch's forward and backward pass.

    Args:
        cost: The model's.
        batch: As `collate.stack` made it, on the CPU.
    """
    lengths = batch["document_lengths"][:, :-1].double()  # The last column is padding.
    pairs = float((lengths * (lengths + 1) / 2).sum())
    multiplied = cost.matrices * float(lengths.sum()) + cost.head * float(batch["trained"].sum())
    return FORWARD_AND_BACKWARD * 2 * (multiplied + 2 * cost.attention * pairs)
