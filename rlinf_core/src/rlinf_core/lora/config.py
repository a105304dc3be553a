"""The table `[policy.lora]`: which layers get low-rank adapters, of which rank, and what is trained beside them.

A layer with the weight W computes W x + scale · B A x, where A [rank, inputs] and B [outputs, rank] are trained and W
is not (arXiv 2106.09685). Names, initial values and files are those of the library PEFT. Importing this loads no torch.
"""

from __future__ import annotations

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

RANK = 16
"""The default rank."""
_STORED = ("rank", "alpha", "rslora", "targets", "rank_pattern", "alpha_pattern", "modules_to_save")
"""What files of adapters say themselves."""


class LoraConfig(BaseModel):
    """Low-rank adapters instead of training all weights. An empty table switches them on."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    rank: int | None = Field(default=None, ge=0)
    """Rank of every adapter that `rank_pattern` does not mention; 0: none. Default: 16."""
    alpha: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """An adapter's change is multiplied by alpha / rank. Default: the rank, that is, a factor of 1."""
    rslora: bool = False
    """Multiply by alpha / sqrt(rank) instead (rsLoRA, arXiv 2312.03732)."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Probability with which an element of an adapter's input is zeroed in training."""
    targets: tuple[str, ...] | None = None
    """The layers with adapters: groups of the policy (`attention`, `mlp`; of π0 and π0.5 also `vlm`, `expert`,
    `vision`, `projections`), intersections of groups (`expert.attention`), the ends of published names (`q_proj`), or
    regular expressions for whole names. Default: the policy's."""
    rank_pattern: dict[str, int] = Field(default_factory=dict)
    """Other ranks for some layers, by the same expressions; the first that matches counts. 0: no adapter."""
    alpha_pattern: dict[str, float] = Field(default_factory=dict)
    """Other values of alpha, likewise."""
    modules_to_save: tuple[str, ...] | None = None
    """Modules that are trained whole beside the adapters, by the same expressions. Default: the policy's."""
    base_dtype: Literal["bf16", "fp32"] = "bf16"
    """How frozen weights are held: in bfloat16 (2 bytes per number) or in float32. Those that are computed in float32
    whatever `trainer.param_dtype` is stay float32."""
    weights: str = ""
    """A folder with adapters in PEFT's layout to continue from, of `rlinf export --adapters` or of PEFT itself. It says
    which layers have adapters, and of which rank."""

    @model_validator(mode="after")
    def _numbers_are_possible(self) -> LoraConfig:
        if bad := [name for name, rank in self.rank_pattern.items() if rank < 0]:
            raise ValueError(f"rank_pattern: the rank of {bad[0]!r} is negative")
        if bad := [name for name, alpha in self.alpha_pattern.items() if not 0 < alpha < math.inf]:
            raise ValueError(f"alpha_pattern: {bad[0]!r} must be a positive number")
        if self.targets is not None and not self.targets:
            raise ValueError("targets names no layer: leave it out for the policy's default, or set rank = 0")
        return self

    @model_validator(mode="after")
    def _a_folder_says_it_all(self) -> LoraConfig:
        # By value: the config of a run has all keys, also those that were not given.
        given = [key for key in _STORED if getattr(self, key) not in (None, False, {})]
        if self.weights and given:
            raise ValueError(
                f"{', '.join(given)} would contradict weights, whose adapter_config.json says it: leave out one of them"
            )
        return self

    def scale_of(self, rank: int, alpha: float | None) -> float:
        """The factor of an adapter's change."""
        alpha = float(rank) if alpha is None else alpha
        return alpha / (math.sqrt(rank) if self.rslora else rank)
