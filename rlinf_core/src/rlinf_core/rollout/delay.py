"""A policy that is slow: what the robot does between an observation and the first use of its actions. Torch-free.

The simulator waits for the policy, so that the delay is exactly what it is set to, on any computer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from rlinf_core.contract.continuation import Continuation
from rlinf_core.errors import UserError
from rlinf_core.rollout.pool import Asking

Chunks = Literal["wait", "switch", "guided", "trained"]


class Latency(BaseModel):
    """How long a policy takes, and how its chunks are joined."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    delay: int = Field(ge=0)
    """From an observation to the first use of its actions, in actions."""
    chunks: Chunks = "wait"
    """`wait`: the robot idles until the chunk is there. Otherwise it goes on with the last chunk. `switch`: chunks are
    unrelated; `guided`, `trained`: real-time chunking."""

    def executed(self, replan: int, horizon: int) -> int:
        """Actions between two observations, without those that the robot idles.

        Args:
            replan: Actions of a chunk to execute; 0: as many as possible.
            horizon: Actions in a chunk.

        Raises:
            UserError: The robot would have nothing to execute while the next chunk is computed.
        """
        if self.chunks == "wait":
            return min(replan or horizon, horizon)
        most = horizon - self.delay
        executed = max(replan or most, self.delay, 1)
        if executed > most:
            ways = f"--replan {most} or less" if self.delay <= most else f"a delay of {horizon // 2} or less"
            raise UserError(
                f"a delay of {self.delay} actions and {executed} actions between observations need chunks of "
                f"{executed + self.delay} actions, but the policy's have {horizon}: choose {ways}"
            )
        return executed


class ContinuingAct(Protocol):
    """`LoadedPolicy.act`."""

    def __call__(
        self,
        observations: Sequence[Mapping[str, Any]],
        generators: Sequence[np.random.Generator],
        continuing: Sequence[Continuation | None],
    ) -> list[NDArray[np.floating]]:
        """Observations -> chunks [H, D] in the data's units."""
        ...


@dataclass(eq=False)
class DelayedAgent:
    """A policy whose actions come late. The first chunk of an episode is there at once: the robot has not started."""

    act: ContinuingAct
    latency: Latency
    executed: int
    """`Latency.executed`."""
    looks: bool = True
    _left: dict[tuple[str, str, int], NDArray[np.floating]] = field(default_factory=dict)
    """What is left of each episode's chunk, from the action that is due."""

    def __call__(self, asking: Sequence[Asking]) -> list[NDArray[np.floating]]:
        """What each robot executes until it looks again."""
        for one in asking:
            if one.steps == 0:
                self._left.pop(one.episode.key, None)
        seen, generators = [one.observation or {} for one in asking], [one.generator for one in asking]
        chunks = self.act(seen, generators, [self._continuation(one) for one in asking])
        return [self._until_next(one, chunk) for one, chunk in zip(asking, chunks, strict=True)]

    def _continuation(self, one: Asking) -> Continuation | None:
        left, chunks = self._left.get(one.episode.key), self.latency.chunks
        if left is None or chunks in ("wait", "switch"):
            return None
        return Continuation(left, self.latency.delay, way="guided" if chunks == "guided" else "trained")

    def _until_next(self, one: Asking, chunk: NDArray[np.floating]) -> NDArray[np.floating]:
        key, delay = one.episode.key, self.latency.delay
        before = self._left.get(key)
        self._left[key] = chunk[self.executed :]
        if before is None:
            return chunk[: self.executed]
        if self.latency.chunks == "wait":
            return np.concatenate([np.tile(one.space.idle, (delay, 1)), chunk[: self.executed]])
        return np.concatenate([before[:delay], chunk[delay : self.executed]])
