"""The noise of a request that sends a seed: what the same draw of a generator in the client's process would be.

An evaluation in a simulator seeds a generator per episode and draws the noise of one chunk after another from it
(`rlinf_core.rollout.seeds`). A client that has no policy cannot draw; it sends the seed and the number of the chunk.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlinf_core.contract.policy import PolicyConfig
from rlinf_core.errors import UserError
from rlinf_core.rollout.seeds import generator_of

MOST_WORDS, LARGEST_WORD = 8, 2**63 - 1
MOST_DRAWS = 10_000
"""Chunks of an episode: drawing costs microseconds for each that was skipped."""
REMEMBERED = 256
"""Episodes whose next draw is remembered."""


class Draws:
    """Draws the noise of seeded requests, remembering where each generator is."""

    def __init__(self, config: PolicyConfig) -> None:
        self.config = config
        self._open: OrderedDict[tuple[int, ...], tuple[int, np.random.Generator]] = OrderedDict()

    def noise(self, seed: Any, draw: Any) -> NDArray[np.float32]:
        """The noise of a chunk.

        Args:
            seed: The client's: a whole number from 0, or up to 8 of them.
            draw: The number of the chunk since the generator was seeded, from 0; None: 0.

        Raises:
            UserError: They are not such numbers.
        """
        words, number = _words(seed), 0 if draw is None else _whole(draw, MOST_DRAWS - 1)
        if words is None or number is None:
            raise UserError(
                f"seed is {str(seed)[:60]!r} and draw {str(draw)[:20]!r}, but must be a whole number from 0, or a list "
                f"of up to {MOST_WORDS} of them, and a whole number below {MOST_DRAWS}"
            )
        done, generator = self._open.pop(words, (0, None))
        if generator is None or done > number:
            done, generator = 0, generator_of(words)
        for _ in range(number - done):
            self.config.draw(generator)
        noise: NDArray[np.float32] = self.config.draw(generator)["noise"]
        self._open[words] = number + 1, generator
        if len(self._open) > REMEMBERED:
            self._open.popitem(last=False)
        return noise


def _words(seed: Any) -> tuple[int, ...] | None:
    listed = list(seed) if isinstance(seed, (list, tuple, np.ndarray)) and np.ndim(seed) == 1 else [seed]
    words = [_whole(one, LARGEST_WORD) for one in listed]
    if not words or len(words) > MOST_WORDS or None in words:
        return None
    return tuple(one for one in words if one is not None)


def _whole(value: Any, largest: int) -> int | None:
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        return None
    return int(value) if 0 <= value <= largest else None
