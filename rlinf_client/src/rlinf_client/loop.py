"""A control loop at a fixed rate, and what it measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from rlinf_client.timing import Timing


class Broker(Protocol):
    """`ChunkBroker` or `OverlappedBroker`."""

    def act(self, observation: Mapping[str, Any], /) -> Any:
        """Observation -> the action of this tick."""
        ...


def control(
    broker: Broker,
    observe: Callable[[], Mapping[str, Any]],
    execute: Callable[[Any], object],
    *,
    rate_hz: float,
    ticks: int | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Observe, act and execute once a tick, at a fixed rate, until `ticks` are done or `stop` returns true.

    Args:
        broker: Gives one action per observation.
        observe: The robot's observation, as `PolicyClient.infer` takes it.
        execute: Sends an action [D] to the robot.
        rate_hz: Ticks per second: the rate at which the policy's data were recorded.
        ticks: How many; None: until `stop`.
        stop: Called before every tick.

    Returns:
        `ticks`, `late` (ticks that ended after the next one was due), and `act_ms`, percentiles of the time that `act`
        took.
    """
    if not rate_hz > 0:
        raise ValueError(f"rate_hz is {rate_hz}, but must be greater than 0")
    taken, late, done = Timing(), 0, 0
    due = time.perf_counter()
    while (ticks is None or done < ticks) and not stop():
        observation = observe()
        start = time.perf_counter()
        action = broker.act(observation)
        taken.add(time.perf_counter() - start)
        execute(action)
        done += 1
        due += 1.0 / rate_hz
        now = time.perf_counter()
        if now > due:
            late += 1
            due = now  # Do not rush through the ticks that were missed.
        else:
            time.sleep(due - now)
    return {"ticks": done, "late": late, "act_ms": taken.summary()}
