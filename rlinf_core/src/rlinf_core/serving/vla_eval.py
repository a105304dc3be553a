"""The protocol of vla-eval (vla-evaluation-harness), version 1: typed, numbered messages in msgpack.

The harness asks once per step and gets one action; a new chunk is computed when the last one is used up.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from importlib import metadata
from typing import Any

from rlinf_client.wire import WireError, pack, unpack
from rlinf_core.data.images.pictures import decode
from rlinf_core.errors import UserError
from rlinf_core.serving.engine import Computed

VLA_EVAL = "/vla-eval"
PROTOCOL = 1
FIELDS = ("type", "payload", "seq", "timestamp")


class Session:
    """The chunk that a client is executing: the harness asks for one action per step."""

    def __init__(self) -> None:
        self.left: list[Any] = []


async def answer(
    message: str | bytes, session: Session, act: Callable[[Any], Awaitable[Computed | str]]
) -> tuple[bytes | None, Computed | None]:
    """The reply to a message, if it has one, and what was computed for it.

    Args:
        message: As received.
        session: The client's.
        act: Actions for an observation, or the text of an error.
    """
    try:
        if isinstance(message, str):
            raise WireError("messages are binary msgpack, not text")
        # Compressed images are decoded; other clients do not wait for that.
        found = await asyncio.to_thread(unpack, message, lambda data: decode(data, "an image of the observation"))
        if not isinstance(found, Mapping) or any(name not in found for name in FIELDS):
            raise WireError(f"a message is a map with {', '.join(FIELDS)}")
    except (WireError, UserError) as error:
        return _pack("error", {"error": str(error)}, 0), None
    kind, number = found["type"], found["seq"]
    if kind == "hello":
        version = metadata.version("rlinf-core")
        return _pack(
            "hello",
            {
                "harness_version": version,
                "protocol_version": PROTOCOL,
                "capabilities": {},
                "model_server": "rlinf serve",
                "observation_params": PARAMETERS,
            },
            number,
        ), None
    if kind in ("episode_start", "episode_end"):
        session.left = []
        return None, None
    if kind != "observation":
        return (None, None) if kind == "error" else (_pack("error", {"error": "unknown type of message"}, number), None)
    if session.left:
        return _pack("action", {"actions": session.left.pop(0)}, number), None
    computed = await act(found["payload"])
    if isinstance(computed, str):
        return _pack("error", {"error": computed}, number), None
    first, *session.left = computed.actions.astype("float32")
    return _pack("action", {"actions": first}, number), computed


PARAMETERS = {"send_wrist_image": True, "send_state": True}
"""What a benchmark is asked to send beside its main camera."""


def _pack(kind: str, payload: Any, number: Any) -> bytes:
    number = number if isinstance(number, int) else 0
    return pack({"type": kind, "payload": payload, "seq": number, "timestamp": time.time()}, "vla-eval")
