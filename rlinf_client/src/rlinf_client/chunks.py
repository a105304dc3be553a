"""One action at a time from chunks of actions: wait for each chunk, or compute the next one while this one is executed.

A tick is one control step: one call of `act`, one action. `ChunkBroker` stands still while the server computes.
`OverlappedBroker` asks for the next chunk while the robot executes the current one. When it arrives, some of its
actions are already in the past; the robot continues with the one that is due, and jumps from one chunk to the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Actions = NDArray[np.floating[Any]]


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
        execute: Actions of a chunk to execute before the next one is asked for; more are executed until it arrives.
        simulated_delay: Take exactly this many ticks for every chunk, for experiments in a simulator, which waits; the
            server then works between two ticks. None: real time.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        policy: ChunkPolicy,
        *,
        execute: int,
        simulated_delay: int | None = None,
    ) -> None:
        if execute < 1 or (simulated_delay or 0) < 0:
            raise ValueError("execute must be at least 1, simulated_delay at least 0")
        self.policy, self.execute = policy, execute
        self.simulated_delay = simulated_delay
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
        if self._pending is None and (self._chunk is None or self._next >= min(self.execute, len(self._chunk))):
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

    def _clear(self) -> None:
        self._chunk: Actions | None = None
        self._pending: Future[Mapping[str, Any]] | None = None
        self._last = None
        self._next = self._asked_ago = 0

    def _ask(self, observation: Mapping[str, Any]) -> None:
        self._asked_ago = 0
        self._pending = self._submit(lambda: self.policy.infer(observation))
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
        self._chunk, self._next = chunk, min(self._asked_ago if self._last is not None else 0, len(chunk) - 1)
        self.chunks += 1
        if self._last is not None:
            self.largest_jump = max(self.largest_jump, float(np.abs(chunk[self._next] - self._last).max(initial=0.0)))


def _actions(result: Mapping[str, Any]) -> Actions:
    actions = np.asarray(result["actions"])
    if actions.ndim != 2 or not len(actions):
        raise ValueError(f"the policy's actions have shape {list(actions.shape)}, but a chunk is [H, D]")
    return actions
