"""Findings of a check of a dataset's files, with file, episode and frame; the most severe kinds first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

FindingKind = Literal[
    "metadata",
    "missing_file",
    "unreadable_file",
    "missing_column",
    "wrong_count",
    "wrong_index",
    "not_finite",
    "wrong_shape",
    "not_rgb",
    "wrong_timestamp",
    "unknown_task",
    "empty_episode",
    "damaged_video",
    "damaged_image",
    "no_statistics",
    "stale_pointer",
    "stale_index",
    "other_task",
    "derived_column",
    "other_clock",
    "spare_frames",
    "unlisted_file",
]
"""Most severe first."""
NOTES: frozenset[FindingKind] = frozenset(
    (
        *("no_statistics", "stale_pointer", "stale_index", "other_task", "derived_column", "other_clock"),
        *("spare_frames", "unlisted_file"),
    )
)
"""Kinds that do not prevent training; they are reported but do not count as damage."""
LISTED = 20
"""Findings that are listed per kind; further ones are only counted."""


@dataclass(frozen=True)
class FileFinding:
    """One problem with a dataset's files."""

    kind: FindingKind
    message: str
    """What was found, and what was expected."""
    file: str = ""
    """Relative to the dataset's folder."""
    episode: int | None = None
    """The dataset's episode number."""
    frame: int | None = None
    """The first affected frame, counted from the start of the episode."""

    def __str__(self) -> str:
        episode = "" if self.episode is None else f"episode {self.episode}"
        frame = "" if self.frame is None else f"frame {self.frame}"
        place = ", ".join(part for part in (self.file, episode, frame) if part)
        return f"{place}: {self.message}" if place else self.message

    def to_json(self) -> dict[str, Any]:
        """All fields, and `note`: true if it does not count as damage."""
        return {**self.__dict__, "note": self.kind in NOTES}


@dataclass
class Damage:
    """All findings: their number by kind, and the first `LISTED` of each kind."""

    counts: Counter[FindingKind] = field(default_factory=Counter)
    listed: list[FileFinding] = field(default_factory=list)

    def add(self, findings: Iterable[FileFinding]) -> None:
        """Add findings."""
        for finding in findings:
            self.counts[finding.kind] += 1
            if self.counts[finding.kind] <= LISTED:
                self.listed.append(finding)

    @property
    def ok(self) -> bool:
        """Whether there is no damage; there may be notes."""
        return not self.counts.keys() - NOTES

    def by_kind(self) -> dict[FindingKind, list[FileFinding]]:
        """The listed findings, most severe kinds first, sorted by file, episode and frame."""

        def position(finding: FileFinding) -> tuple[str, int, int]:
            return finding.file, finding.episode or 0, finding.frame or 0

        found = sorted(self.listed, key=position)
        return {kind: [one for one in found if one.kind == kind] for kind in get_args(FindingKind) if self.counts[kind]}
