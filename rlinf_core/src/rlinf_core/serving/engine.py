"""The thread that computes: requests wait in a bounded queue, and those that wait together are one batch."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from rlinf_core.errors import UserError
from rlinf_core.inference import LoadedPolicy
from rlinf_core.real_time import Encoded
from rlinf_core.sampling import check_steps
from rlinf_core.serving.continuation import to_continuation
from rlinf_core.serving.draws import Draws
from rlinf_core.serving.observations import DRAW, NOISE, SEED, STEPS, to_row


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
    noise: Any = None
    steps: int | None = None


class Engine:
    """Compute actions in a thread of its own.

    Args:
        policy: What acts.
        most_waiting: Requests that may wait; more are refused at once.
        most_together: The largest batch.
        failed: Called with a defect, which the client does not see.
        first: What to compute before any request, in the thread that computes them: `warmed` has its result.
    """

    def __init__(
        self,
        policy: LoadedPolicy,
        *,
        most_waiting: int,
        most_together: int,
        failed: Callable[[Exception], object],
        first: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self.policy, self.most_together, self.failed = policy, most_together, failed
        self._draws = Draws(policy.config)
        self.warmed: Future[float] = Future()
        self._first = first
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
        """Finish what waits, and end the thread; do not wait for `first`, which may take minutes."""
        self._waiting.put(None)
        if self.warmed.done():
            self._thread.join()

    def _work(self) -> None:
        try:
            self.warmed.set_result(self._first())
        except BaseException as error:
            self.warmed.set_exception(error)
            return
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
                encoded.append((request, *self._encode(request)))
            except Exception as error:
                self._fail(request, error)
        for steps in dict.fromkeys(request.steps for request, *_ in encoded):
            self._act([one for one in encoded if one[0].steps == steps], steps, start)

    def _encode(self, request: _Request) -> tuple[Any, Encoded | None]:
        """The request's sample and the actions that its chunk continues; its row, noise and steps become known."""
        row = request.row = to_row(self.policy.data, request.observation)
        request.steps = check_steps(self.policy.config, row.get(STEPS), STEPS)
        if (NOISE in row) + (SEED in row) > 1 or (DRAW in row and SEED not in row):
            raise UserError("send noise, or a seed, of which draw is the number of the chunk")
        request.noise = self._draws.noise(row[SEED], row.get(DRAW)) if SEED in row else row.get(NOISE)
        sample, continuing = self.policy.encode(row), to_continuation(request.observation)
        if continuing is None:
            return sample, None
        return sample, self.policy.encode_continuation(row, sample, continuing)

    def _act(self, encoded: list[tuple[_Request, Any, Encoded | None]], steps: int | None, start: float) -> None:
        """Compute requests with the same number of steps, and hand over their actions."""
        try:
            requests, samples, previous = zip(*encoded, strict=True)
            chunks = self.policy.act_on(samples, [one.noise for one in requests], previous, steps)
        except Exception as error:
            if len(encoded) > 1:  # One of them may be to blame: the others get their actions.
                for one in encoded:
                    self._act([one], steps, start)
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
