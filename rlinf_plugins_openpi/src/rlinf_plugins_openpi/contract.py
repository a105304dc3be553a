"""What the trainer asks of a model, as in `rlinf_core.policy`, on torch and the standard library alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from torch import nn


class PolicyOutput(NamedTuple):
    """`rlinf_core.policy.PolicyOutput`, field for field: that module needs pydantic, this one must not."""

    loss_sum: torch.Tensor
    weight: torch.Tensor
    metrics: Mapping[str, torch.Tensor]
    sample_losses: torch.Tensor | None = None


class ShardUnit(NamedTuple):
    """`rlinf_core.policy.ShardUnit`, field for field."""

    module: nn.Module
    dtype: Literal["compute", "fp32"] = "compute"
    block: bool = False
    reached: bool = True
