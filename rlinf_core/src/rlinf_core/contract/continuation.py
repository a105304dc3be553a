"""What a chunk continues in real-time chunking: the actions that are due while the policy computes. Torch-free.

Names are those of lerobot and of the papers: Black et al., arXiv 2506.07339 (guided), 2512.05964 (trained).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from rlinf_core.errors import UserError

Way = Literal["auto", "guided", "trained"]
Schedule = Literal["exp", "linear", "ones", "zeros"]


@dataclass(frozen=True, eq=False)
class Continuation:
    """The actions that a new chunk continues.

    Raises:
        UserError: A value is out of range; the message has all mistakes.
    """

    actions: NDArray[np.floating[Any]]
    """[T, D] in the data's units: what is left of the chunk that the robot executes, from the action that is due when
    the observation is made."""
    delay: int
    """How many of them the robot will execute before it uses the new chunk: the time from the observation to that
    moment, in actions. The new chunk is used from its action number `delay`, counted from 0."""
    way: Way = "auto"
    """`guided`: denoise towards the actions, which any policy with `continuation_ways` can. `trained`: give the first
    `delay` of them to a policy that was trained for it. `auto`: `trained` if the policy was trained for such a delay,
    else `guided`."""
    execution_horizon: int | None = None
    """Guided: actions from this number on are free of the old ones. None: all `actions` count, as in the paper."""
    max_guidance_weight: float = 5.0
    """Guided: the largest weight of the correction. The paper has 5, lerobot 10."""
    schedule: Schedule = "exp"
    """Guided: how the weights fall from 1 at `delay` to 0 at `execution_horizon`; see `prefix_weights`."""

    def __post_init__(self) -> None:
        actions = np.asarray(self.actions)
        mistakes = []
        if actions.ndim != 2 or not actions.size or actions.dtype.kind not in "fiu":
            mistakes.append(f"the actions to continue are {actions.dtype} {list(actions.shape)}, but must be [T, D]")
        elif not np.isfinite(actions).all():
            mistakes.append("the actions to continue contain NaN or infinity")
        elif not isinstance(self.delay, (int, np.integer)) or not 0 <= self.delay <= len(actions):
            mistakes.append(
                f"the delay is {self.delay!r}, but must be a whole number from 0 to {len(actions)}, the actions to "
                "continue: after them the robot has nothing to execute"
            )
        if self.execution_horizon is not None and (
            not isinstance(self.execution_horizon, (int, np.integer)) or self.execution_horizon < 1
        ):
            mistakes.append(f"execution_horizon is {self.execution_horizon!r}, but must be a whole number above 0")
        if not isinstance(self.max_guidance_weight, (int, float)) or not 0 < self.max_guidance_weight < np.inf:
            mistakes.append(f"max_guidance_weight is {self.max_guidance_weight!r}, but must be greater than 0")
        mistakes += [
            f"the {name} is {value!r}, but must be one of {', '.join(get_args(kind))}"
            for name, value, kind in (("way", self.way, Way), ("schedule", self.schedule, Schedule))
            if value not in get_args(kind)
        ]
        if mistakes:
            raise UserError("; ".join(mistakes))

    def weights(self, horizon: int) -> NDArray[np.float32]:
        """How much each action of a chunk of `horizon` is guided, [H]."""
        end = min(self.execution_horizon or horizon, len(self.actions), horizon)
        return prefix_weights(self.delay, end, horizon, self.schedule)


def prefix_weights(start: int, end: int, horizon: int, schedule: Schedule = "exp") -> NDArray[np.float32]:
    """The soft mask: 1 for actions before `start`, 0 from `end` on, and between them falling by `schedule`.

    With c from 1 at `start` - 1 down to 0 at `end` in equal steps: `linear`: c; `exp`, as in the paper: c (e^c - 1) /
    (e - 1). `ones`: 1 up to `end`; `zeros`: 0 from `start` on.

    Args:
        start: The delay; more than `end` counts as `end`.
        end: The first action that is not guided.
        horizon: Actions in a chunk.
        schedule: How weights fall.

    Returns:
        [H] float32.
    """
    start = min(start, end)
    index = np.arange(horizon)
    between: NDArray[np.float64]
    if schedule == "ones":
        between = np.ones(horizon)
    elif schedule == "zeros":
        between = np.zeros(horizon)
    else:
        between = (end - index) / (end - start + 1)
        if schedule == "exp":
            between = between * np.expm1(between) / np.expm1(1.0)
    return np.where(index < start, 1.0, np.where(index < end, between, 0.0)).astype(np.float32)
