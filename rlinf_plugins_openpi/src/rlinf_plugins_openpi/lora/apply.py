"""Put openpi's LoRA into a π0 or π0.5 on the meta device, and freeze what openpi's filter freezes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import groupby
from typing import Any

from torch import nn

from rlinf_core.lora.apply import freeze, hold_frozen
from rlinf_plugins_openpi.lora import layout
from rlinf_plugins_openpi.lora.config import OpenpiLoraConfig
from rlinf_plugins_openpi.lora.layers import OpenpiLoraLinear


def add_openpi_lora(
    policy: Any, lora: OpenpiLoraConfig, modules: Mapping[str, str], whole: Collection[str] | None = None
) -> None:
    """As `rlinf_core.lora.apply.add_lora`, in openpi's convention.

    Args:
        policy: A `Pi0`.
        lora: The table.
        modules: Linear layers by the names of the tables of `weights` -> published names.
        whole: The parameters that are trained whole, by the model's own names; None: those of openpi's filter.
    """
    if whole is None:
        names = [name for name, _ in policy.named_parameters()]
        whole = {name for name in names if layout.trained_whole(name, lora.ranks)}
    freeze(policy, whole)
    for layer, pairs in groupby(_pairs(policy, lora), key=lambda pair: pair.layer):
        linear = policy.get_submodule(layer)
        assert isinstance(linear, nn.Linear)
        policy.set_submodule(layer, OpenpiLoraLinear(linear, list(pairs), modules))
    hold_frozen(policy, lora.base_dtype)


def _pairs(policy: Any, lora: OpenpiLoraConfig) -> list[layout.Pair]:
    found = layout.pairs(policy.dimensions, lora.ranks, lora.scales)
    return sorted(found, key=lambda pair: (pair.layer, pair.first))
