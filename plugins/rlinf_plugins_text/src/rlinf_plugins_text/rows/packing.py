"""Which texts share a sequence: best fit, longest first, so that little stays empty. Only their lengths count."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def pack(lengths: NDArray[np.int64], capacity: int) -> list[NDArray[np.int64]]:
    """Deal texts to packs.

    Args:
        lengths: [N], tokens of each text, none above the capacity.
        capacity: Tokens of a pack.

    Returns:
        The texts of each pack, in the order of their numbers; every text is in one pack.
    """
    room: list[tuple[int, int]] = []  # (tokens left, pack), sorted.
    packs: list[list[int]] = []
    for text in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[text])
        place = bisect_left(room, (length, -1))
        if place == len(room):
            packs.append([])
            left, number = capacity, len(packs) - 1
        else:
            left, number = room.pop(place)
        packs[number].append(text)
        if left > length:
            insort(room, (left - length, number))
    return [np.array(sorted(texts), np.int64) for texts in packs]


def flatten(groups: Sequence[NDArray[np.int64]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Groups as one array, and where each begins and ends in it: [sum], [N + 1]."""
    ends = np.cumsum([0, *(len(group) for group in groups)], dtype=np.int64)
    return (np.concatenate(groups) if groups else np.zeros(0, np.int64)), ends
