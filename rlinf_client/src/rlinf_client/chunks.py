"""One action at a time from chunks of actions: wait for each chunk, or compute the next one while this one is executed.

A tick is one control step: one call of `act`, one action. `ChunkBroker` stands still while the server computes.
`OverlappedBroker` asks for the next chunk while the robot executes the current one. When it arrives, some of its
actions are already in the past; the robot continues with the one that is due. With real-time chunking (arXiv 2506.07339
and 2512.05964), the server computes the new chunk as a continuation of the current one; otherwise the robot jumps from
one to the other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

Actions = NDArray[np.floating[Any]]
Way = Literal["auto", "guided", "trained", "switch"]

OFFERS = "real_time_chunking"
"""Key of the server's metadata: how it continues chunks -> the longest delay. And of requests: how to do it."""
DELAYS = 10
"""The expected delay is the longest of this many latest ones: too long costs reactivity, too short smoothness."""


class ChunkPolicy(Protocol):
    """What brokers need: `PolicyClient`, openpi's client, or a policy in this process."""

    def infer(self, observation: Mapping[str, Any], /, **options: Any) -> Mapping[str, Any]:
        """Observation -> `actions` [H, D]."""
        ...


class ChunkBroker:
    """Execute some actions of a chunk, then wait for the next one.

    Args:
        policy: Where chunks come from.
        execute: Actions of a chunk to execute, from its first; None: all.
    """

    def __init__(self, policy: ChunkPolicy, execute: int | None = None) -> None:
        if execute is not None and execute < 1:
            raise ValueError(f"execute is {execute}, but at least one action of a chunk must be executed")
        self.policy, self.execute = policy, execute
        self._chunk: Actions | None = None
        self._next = 0

    def act(self, observation: Mapping[str, Any]) -> Actions:
        """The action for this tick, [D]; asks the policy if the last chunk is used up."""
        if self._chunk is None:
            self._chunk, self._next = _actions(self.policy.infer(observation)), 0
        action: Actions = self._chunk[self._next]
        self._next += 1
        if self._next >= min(self.execute or len(self._chunk), len(self._chunk)):
            self._chunk = None
        return action

    def reset(self) -> None:
        """Forget the chunk: call it between episodes."""
        self._chunk = None


class OverlappedBroker:
    """Execute a chunk while the next one is computed.

    Args:
        policy: Where chunks come from.
        execute: Actions of a chunk to execute before the next one is asked for; more are executed until it arrives, and
            fewer if the chunk would end before it.
        way: How chunks are joined. `guided`: the server denoises the next chunk towards the actions that are left of
            this one. `trained`: it gives those that will be executed meanwhile to a policy that was trained for it.
            `switch`: chunks are unrelated. `auto`: what the server offers; of several, the best for each delay.
        expected_delay: Actions between an observation and the first use of its chunk, until one was measured; then the
            longest of the last 10.
        options: More keys of each request that continues a chunk, such as `max_guidance_weight`.
        simulated_delay: Take exactly this many ticks for every chunk, for experiments in a simulator, which waits; the
            server then works between two ticks. None: real time.

    Raises:
        ValueError: An argument is out of range, or the server does not offer `way`.
    """

    def __init__(
        self,
        policy: ChunkPolicy,
        *,
        execute: int,
        way: Way = "auto",
        expected_delay: int = 1,
        options: Mapping[str, Any] | None = None,
        simulated_delay: int | None = None,
    ) -> None:
        if execute < 1 or expected_delay < 0 or (simulated_delay or 0) < 0:
            raise ValueError("execute must be at least 1, delays at least 0")
        self.policy, self.execute, self.options = policy, execute, dict(options or {})
        self.way = _offered(policy, way)
        """How chunks are joined."""
        self.simulated_delay = simulated_delay
        self._first_delay = expected_delay if simulated_delay is None else simulated_delay
        self._delays: deque[int] = deque(maxlen=DELAYS)
        self._threads = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rlinf-client")
        self.ticks = self.chunks = self.stalls = 0
        """Actions given; chunks used; ticks for which the robot had to wait for a chunk."""
        self.largest_jump = 0.0
        """Largest change of a number of the action between two chunks, in its unit."""
        self._next = self._asked_ago = 0
        self._last: Actions | None = None
        self._clear()

    def act(self, observation: Mapping[str, Any]) -> Actions:
        """The action for this tick, [D].

        Args:
            observation: What the robot sees now. It is sent if a chunk is to be asked for; do not change its arrays
                afterwards.

        Raises:
            ServerError, ConnectionError: What asking for a chunk raised, in the tick that would have used it.
        """
        if self._pending is not None and self._has_arrived(self._pending):
            self._install()
        if self._pending is None and (self._chunk is None or self._next >= self._due(len(self._chunk))):
            self._ask(observation)
        if self._pending is not None and (self._chunk is None or self._next >= len(self._chunk)):
            self.stalls += self._chunk is not None
            self._install()
        assert self._chunk is not None
        action: Actions = self._chunk[self._next]
        self._next += 1
        self._asked_ago += 1
        self.ticks += 1
        self._last = action
        return action

    def reset(self) -> None:
        """Forget the chunk, after waiting for one that is being computed: call it between episodes."""
        if self._pending is not None:
            self._pending.exception()
        self._clear()

    def close(self) -> None:
        """Wait for what is being computed, and end the thread."""
        self._threads.shutdown()

    @property
    def expected_delay(self) -> int:
        """Actions between an observation and the first use of its chunk: what the server is sent as the delay."""
        return max(self._delays, default=self._first_delay)

    def _due(self, length: int) -> int:
        """After how many actions of a chunk to ask for the next one."""
        return min(self.execute, max(1, length - self.expected_delay))

    def _clear(self) -> None:
        self._chunk: Actions | None = None
        self._pending: Future[Mapping[str, Any]] | None = None
        self._last = None
        self._next = self._asked_ago = 0

    def _ask(self, observation: Mapping[str, Any]) -> None:
        options: dict[str, Any] = {}
        left = None if self._chunk is None else self._chunk[self._next :]
        if left is not None and len(left) and self.way != "switch":
            delay = min(self.expected_delay, len(left))
            options = {"prev_chunk_left_over": left, "inference_delay": delay, OFFERS: self.way, **self.options}
        self._asked_ago = 0
        self._pending = self._submit(lambda: self.policy.infer(observation, **options))
        if self.simulated_delay == 0:
            self._install()

    def _submit(self, work: Callable[[], Mapping[str, Any]]) -> Future[Mapping[str, Any]]:
        if self.simulated_delay is None:
            return self._threads.submit(work)
        done: Future[Mapping[str, Any]] = Future()
        try:
            done.set_result(work())
        except Exception as error:  # Raised where the chunk is used, as with a thread.
            done.set_exception(error)
        return done

    def _has_arrived(self, pending: Future[Mapping[str, Any]]) -> bool:
        return pending.done() if self.simulated_delay is None else self._asked_ago >= self.simulated_delay

    def _install(self) -> None:
        assert self._pending is not None
        pending, self._pending = self._pending, None
        chunk = _actions(pending.result())
        if self._chunk is not None:
            self._delays.append(self._asked_ago)
        self._chunk, self._next = chunk, min(self._asked_ago if self._last is not None else 0, len(chunk) - 1)
        self.chunks += 1
        if self._last is not None:
            self.largest_jump = max(self.largest_jump, float(np.abs(chunk[self._next] - self._last).max(initial=0.0)))


def _actions(result: Mapping[str, Any]) -> Actions:
    actions = np.asarray(result["actions"])
    if actions.ndim != 2 or not len(actions):
        raise ValueError(f"the policy's actions have shape {list(actions.shape)}, but a chunk is [H, D]")
    return actions


def _offered(policy: ChunkPolicy, way: Way) -> Way:
    """The way that the server offers; `switch` needs nothing of it."""
    offers = getattr(policy, "metadata", {}).get(OFFERS, ())
    if way == "auto":
        return "auto" if offers else "switch"
    if way != "switch" and way not in offers:
        there = ", ".join([*map(str, offers), "switch"])
        raise ValueError(f"the server does not offer {way!r} real-time chunking; possible: {there}")
    return way
