"""Which parameters stay as the weights have them. Frozen ones cost no gradient, no optimizer state and no average."""

from __future__ import annotations

import re
from typing import Literal

Part = Literal["nothing", "vision", "vlm", "all_but_expert"]

_PATTERNS: dict[Part, re.Pattern[str]] = {
    "nothing": re.compile(r"$^"),
    "vision": re.compile(r"vision\."),
    "vlm": re.compile(r"(vision|embedding|prefix_end)\.|layers\.\d+\.vlm\."),
    "all_but_expert": re.compile(r"(?!layers\.\d+\.expert\.|expert_norm\.|modulation\.)"),
}


def is_frozen(name: str, part: Part) -> bool:
    """Whether the parameter of this name (the module's own) belongs to the frozen part.

    `vision` is the image tower with its projection, `vlm` that and the language model; `all_but_expert` leaves only the
    action expert's layers and norms to train, without the projections of states, actions and time.
    """
    return _PATTERNS[part].match(name) is not None
