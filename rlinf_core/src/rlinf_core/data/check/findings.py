"""What is wrong with a dataset: findings that name file, episode and frame, the worst kinds first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

Kind = Literal[
    "metadata",
    "missing_file",
    "unreadable_file",
    "missing_column",
    "wrong_count",
    "wrong_index",
    "not_finite",
    "wrong_shape",
    "wrong_timestamp",
    "unknown_task",
    "empty_episode",
    "damaged_video",
    "damaged_image",
    "no_statistics",
    "spare_frames",
    "unlisted_file",
]
"""Most severe first."""
NOTES: frozenset[Kind] = frozenset(("no_statistics", "spare_frames", "unlisted_file"))
"""Kinds that a dataset can be trained on with; they are told, and do not count as damage."""
LISTED = 20
"""Findings of a kind that are listed; further ones are counted."""


@dataclass(frozen=True)
class Finding:
    """One damage."""

    kind: Kind
    message: str
    """What is there, and what belongs there."""
    file: str = ""
    """Relative to the dataset's folder."""
    episode: int | None = None
    """The dataset's own number."""
    frame: int | None = None
    """The first one concerned, counted from the start of the episode."""

    def __str__(self) -> str:
        episode = "" if self.episode is None else f"episode {self.episode}"
        frame = "" if self.frame is None else f"frame {self.frame}"
        place = ", ".join(part for part in (self.file, episode, frame) if part)
        return f"{place}: {self.message}" if place else self.message

    def to_json(self) -> dict[str, Any]:
        """For programs: all fields, with `note` for what is no damage."""
        return {**self.__dict__, "note": self.kind in NOTES}


@dataclass
class Damage:
    """All findings so far: `LISTED` of each kind, and how many there are."""

    counts: Counter[Kind] = field(default_factory=Counter)
    listed: list[Finding] = field(default_factory=list)

    def add(self, findings: Iterable[Finding]) -> None:
        """Keep findings."""
        for finding in findings:
            self.counts[finding.kind] += 1
            if self.counts[finding.kind] <= LISTED:
                self.listed.append(finding)

    @property
    def ok(self) -> bool:
        """Whether nothing is damaged; there may be notes."""
        return not self.counts.keys() - NOTES

    def by_kind(self) -> dict[Kind, list[Finding]]:
        """The listed findings, most severe kinds first, each by file, episode and frame."""

        def place(finding: Finding) -> tuple[str, int, int]:
            return finding.file, finding.episode or 0, finding.frame or 0

        found = sorted(self.listed, key=place)
        return {kind: [one for one in found if one.kind == kind] for kind in get_args(Kind) if self.counts[kind]}
