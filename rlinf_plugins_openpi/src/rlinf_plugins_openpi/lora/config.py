"""The table `[policy.lora]` of π0 and π0.5: the usual LoRA, or openpi's, which differs from it. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import model_validator

from rlinf_core.lora.config import LoraConfig

EXPERTS = ("vlm", "expert")
PUBLISHED_RANKS = {"vlm": 16, "expert": 32}
"""Ranks of openpi's variants `gemma_2b_lora` and `gemma_300m_lora`, whose alphas are equal to them."""


class OpenpiLoraConfig(LoraConfig):
    """Low-rank adapters instead of training all weights. An empty table switches them on."""

    convention: Literal["peft", "openpi"] = "peft"
    """`peft`: LoRA as the library PEFT has it. `openpi`: as openpi's JAX trainer computes it. There queries, keys and
    values have adapters for each head, the MLP ignores alpha, A and B both start as normal(0.01), and all parameters
    but the language blocks of the chosen experts are trained whole, the image tower among them. `targets` chooses the
    experts; ranks are 16 (`vlm`) and 32 (`expert`) if `rank` and `rank_pattern` do not say."""

    @model_validator(mode="after")
    def _openpi_has_no_others(self) -> OpenpiLoraConfig:
        if self.convention == "peft":
            return self
        problems = [
            f"{key}: {one!r} is neither 'vlm' nor 'expert', the parts that openpi's convention distinguishes"
            for key in ("targets", "rank_pattern", "alpha_pattern")
            for one in getattr(self, key) or ()
            if one not in EXPERTS
        ]
        if self.dropout:
            problems.append("dropout: openpi's convention has none")
        if self.weights:
            problems.append('weights: adapters in PEFT\'s layout need convention = "peft"')
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def ranks(self) -> Mapping[str, int]:
        """The rank of each expert in openpi's convention; 0: it has no adapters."""
        targets = EXPERTS if self.targets is None else self.targets
        given = PUBLISHED_RANKS if self.rank is None else dict.fromkeys(EXPERTS, self.rank)
        return {one: self.rank_pattern.get(one, given[one]) if one in targets else 0 for one in EXPERTS}

    @property
    def scales(self) -> Mapping[str, float]:
        """The factor of each expert's attention adapters in openpi's convention."""
        return {
            one: self.scale_of(rank, self.alpha_pattern.get(one, self.alpha)) if rank else 1.0
            for one, rank in self.ranks.items()
        }
