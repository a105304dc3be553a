"""The thread that computes: requests wait in a bounded queue, and those that wait together are one batch."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from rlinf_core.errors import UserError
from rlinf_core.inference import LoadedPolicy
from rlinf_core.real_time import Encoded
from rlinf_core.serving.continuation import to_continuation
from rlinf_core.serving.observations import NOISE, to_row


class BusyError(UserError):
    """The queue is full."""


@dataclass
class Computed:
    """A chunk of actions."""

    actions: Any
    """[H, D], in the data's units."""
    state: Any
    """[S], as the client sent it; None if the policy has no state."""
    seconds: float
    """For the whole batch, from encoding to decoding."""
    batch: int
    """Requests that were computed together."""


@dataclass
class _Request:
    observation: Any
    done: asyncio.Future[Computed]
    loop: asyncio.AbstractEventLoop
    row: dict[str, Any] = field(default_factory=dict)


class Engine:
    """Compute actions in a thread of its own.

    Args:
        policy: What acts.
        most_waiting: Requests that may wait; more are refused at once.
        most_together: The largest batch.
        failed: Called with a defect, which the client does not see.
    """

    def __init__(
        self, policy: LoadedPolicy, *, most_waiting: int, most_together: int, failed: Callable[[Exception], object]
    ) -> None:
        self.policy, self.most_together, self.failed = policy, most_together, failed
        self._waiting: queue.Queue[_Request | None] = queue.Queue(most_waiting)
        self._thread = threading.Thread(target=self._work, name="rlinf-serve", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return self._waiting.qsize()

    async def infer(self, observation: Any) -> Computed:
        """Actions for an observation as a client sent it.

        Raises:
            BusyError: The queue is full.
            UserError: The observation is wrong.
        """
        loop = asyncio.get_running_loop()
        request = _Request(observation, loop.create_future(), loop)
        try:
            self._waiting.put_nowait(request)
        except queue.Full:
            raise BusyError("the server is busy: too many requests wait. Try again") from None
        return await request.done

    def close(self) -> None:
        """Finish what waits, and end the thread."""
        self._waiting.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (first := self._waiting.get()) is not None:
            batch, last = [first], False
            while len(batch) < self.most_together and not last:
                try:
                    more = self._waiting.get_nowait()
                except queue.Empty:
                    break
                last = more is None
                batch += [more] if more is not None else []
            self._compute([one for one in batch if not one.done.cancelled()])  # Clients that left need no actions.
            if last:
                return

    def _compute(self, batch: list[_Request]) -> None:
        start = time.perf_counter()
        encoded = []
        for request in batch:
            try:
                request.row = to_row(self.policy.data, request.observation)
                encoded.append((request, *self._encode(request)))
            except Exception as error:
                self._fail(request, error)
        if not encoded:
            return
        try:
            requests, samples, previous = zip(*encoded, strict=True)
            chunks = self.policy.act_on(samples, [one.row.get(NOISE) for one in requests], previous)
        except Exception as error:
            if len(encoded) > 1:  # One of them may be to blame: the others get their actions.
                for request, *_ in encoded:
                    self._compute([request])
            else:
                self._fail(encoded[0][0], error)
            return
        seconds = time.perf_counter() - start
        for (request, *_), actions in zip(encoded, chunks, strict=True):
            if np.isfinite(actions).all():
                found = Computed(actions, _state(self.policy, request.row), seconds, len(encoded))
                _hand_over(request, partial(_give, found=found))
            else:
                self._fail(request, UserError("the policy's actions contain NaN or infinity: a robot must not execute"))

    def _encode(self, request: _Request) -> tuple[Any, Encoded | None]:
        """The sample of an observation, and the actions that its chunk is to continue."""
        sample, continuing = self.policy.encode(request.row), to_continuation(request.observation)
        if continuing is None:
            return sample, None
        return sample, self.policy.encode_continuation(request.row, sample, continuing)

    def _fail(self, request: _Request, error: Exception) -> None:
        if not isinstance(error, UserError):
            self.failed(error)
            error = UserError("the server failed on this observation; its log has the reason")
        _hand_over(request, lambda done: done.set_exception(error))


def _hand_over(request: _Request, give: Callable[[asyncio.Future[Computed]], object]) -> None:
    def settle() -> None:
        if not request.done.done():
            give(request.done)

    try:
        request.loop.call_soon_threadsafe(settle)
    except RuntimeError:  # The loop has ended: nobody waits.
        return


def _give(done: asyncio.Future[Computed], found: Computed) -> None:
    done.set_result(found)


def _state(policy: LoadedPolicy, row: Mapping[str, Any]) -> Any:
    """The state in the data's units, without touching images."""
    columns = getattr(policy.data, "state", ())
    return np.concatenate([np.atleast_1d(row[column]) for column in columns], axis=-1) if columns else None
