"""From the keys of a client's request to what its chunk continues: real-time chunking over the wire.

Names are those of lerobot's policies where it has them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from rlinf_core.contract.continuation import Continuation
from rlinf_core.errors import UserError
from rlinf_core.serving.observations import flattened

ACTIONS, DELAY = "prev_chunk_left_over", "inference_delay"
FIELDS = {
    ACTIONS: "actions",
    DELAY: "delay",
    "real_time_chunking": "way",
    "execution_horizon": "execution_horizon",
    "max_guidance_weight": "max_guidance_weight",
    "prefix_attention_schedule": "schedule",
}
"""Key of a request -> field of `Continuation`."""


def to_continuation(sent: Mapping[str, Any]) -> Continuation | None:
    """What a request continues; None if it has none of the keys, or None under them: the first chunk of an episode.

    Raises:
        UserError: Keys are missing or have wrong values.
    """
    given = {key: value for key, value in flattened(sent) if key in FIELDS and value is not None}
    if not given:
        return None
    if missing := [key for key in (ACTIONS, DELAY) if key not in given]:
        raise UserError(
            f"{', '.join(map(repr, given))} without {' and '.join(map(repr, missing))}: real-time chunking needs "
            f"{ACTIONS!r}, the actions that are not executed yet, [T, D], and {DELAY!r}, how many of them will be "
            "executed before the new chunk is used. For the first chunk of an episode, leave them all out"
        )
    fields = {FIELDS[key]: _plain(value) for key, value in given.items()}
    try:
        fields["actions"] = np.asarray(fields["actions"])
    except ValueError as error:
        raise UserError(f"{ACTIONS!r} is not an array of numbers [T, D]") from error
    if isinstance(fields.get("schedule"), str):
        fields["schedule"] = fields["schedule"].lower()  # lerobot has LINEAR.
    return Continuation(**fields)


def _plain(value: Any) -> Any:
    """Text of old msgpack libraries, and NumPy's scalars, as Python's own."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return value.item() if isinstance(value, np.generic) else value
