"""What openpi's LoRA trains, in numbers; by arithmetic, without torch."""

from __future__ import annotations

import math
from typing import Any

from rlinf_core.lora.selection import numbers, select_whole
from rlinf_plugins_openpi.lora import layout
from rlinf_plugins_openpi.lora.config import OpenpiLoraConfig


def describe(config: Any, lora: OpenpiLoraConfig) -> str:
    """As `rlinf_core.lora.selection.describe`, in openpi's convention.

    Args:
        config: The config of a π0 or π0.5.
        lora: Its table.
    """
    shapes = config.lora_shapes()
    pairs = layout.pairs(config.dimensions, lora.ranks, lora.scales)
    adapters = sum(math.prod(shape) for pair in pairs for shape in pair.parameters.values())
    if lora.modules_to_save is None:
        tables = config.table_names()
        whole = frozenset(name for name in shapes if layout.trained_whole(tables[name], lora.ranks))
    else:
        whole = select_whole(lora, config, shapes)
    ranks = [rank for rank in lora.ranks.values() if rank]
    matrices = sum(len(pair.matrices) for pair in pairs)
    return f"{numbers(adapters, matrices, ranks, whole, shapes)}, held in {lora.base_dtype}"
