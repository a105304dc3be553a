"""Random numbers of an episode: the same in any process, on a server too, and whatever else is played."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np

from rlinf_core.rollout.episodes import Episode


def seed_of(episode: Episode) -> tuple[int, int, int]:
    """What the generator of an episode is seeded with."""
    return episode.start.seed, episode.number, zlib.crc32(f"{episode.agent}/{episode.task.name}".encode())


def generator_of(seed: Sequence[int]) -> np.random.Generator:
    """A generator whose numbers follow from the seed."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(list(seed))))
