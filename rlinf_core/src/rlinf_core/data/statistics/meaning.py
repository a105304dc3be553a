"""Diagnose what the rows mean: prompts, other columns with instructions, splits that the dataset itself names.

All of it is in the metadata or in columns in memory; no image is decoded.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlinf_core.contract.datasets import AnnotatedSource, DatasetConfig, LeRobotDatasetConfig, SampleSource, TaskSource
from rlinf_core.data.normalize import Mode, Origin
from rlinf_core.data.statistics.compute import apply
from rlinf_core.data.statistics.diagnose import Finding
from rlinf_core.data.transforms import Transform

MOST_LISTED = 12
"""Entries of a list of episodes that a message shows; ranges count as one."""
LONGEST_TEXT = 60
"""Characters of a prompt that a message shows."""
FOR_VALIDATION = re.compile(r"(val|valid|validation|eval|evaluation|dev|test|testing|heldout|holdout)([^a-z].*)?")
"""Names of splits that are not for training: `val`, `test_unseen`."""
KEPT_APART = re.compile(r"test.*")


def diagnose_meaning(data: DatasetConfig, source: SampleSource, transforms: Sequence[Transform]) -> list[Finding]:
    """Findings about prompts and splits.

    Args:
        data: The `[data]` table.
        source: Training rows.
        transforms: Repacking, then the dataset's transforms.
    """
    findings = [*_without_prompt(data, source, transforms)]
    if isinstance(source, AnnotatedSource) and isinstance(data, LeRobotDatasetConfig):
        findings += _unused_prompts(data, source)
        findings += _trained_splits(source)
    return findings


def diagnose_quantiles(recorded: Origin, mode: Mode) -> list[Finding]:
    """A finding if quantiles were imported from a lerobot dataset, whose are not those of all frames."""
    if mode != "quantile" or not re.fullmatch(r"lerobot: .*\.json", recorded.dataset):
        return []
    return [
        Finding(
            "lerobot-quantiles",
            "warning",
            "",
            (),
            "the quantiles are combined from those of single episodes, as lerobot writes them to meta/stats.json, and "
            "are not the quantiles of all frames",
            "Leave data.norm_stats empty to compute them",
        )
    ]


def _without_prompt(data: DatasetConfig, source: SampleSource, transforms: Sequence[Transform]) -> Iterator[Finding]:
    """Rows whose prompt is empty after the transforms: one row of each task without a text shows it."""
    if not isinstance(source, TaskSource):
        return
    numbers, texts = source.tasks()
    present, first = np.unique(numbers, return_index=True)
    blank = [(n, i) for n, i in zip(present.tolist(), first.tolist(), strict=True) if not texts.get(n, "").strip()]
    empty = [n for n, i in blank if _is_empty(apply(source.without_images([i])[0], transforms, read_images=False))]
    rows = np.isin(numbers, empty)
    if not rows.any():
        return
    episodes, every = np.unique(source.episodes[rows]), np.unique(source.episodes)
    way_out = "Give them a text in the dataset"
    if isinstance(data, LeRobotDatasetConfig):
        way_out = "Set data.default_prompt"
        if len(episodes) < len(every):
            way_out += f", or leave the episodes out: data.exclude_episodes = {listed(episodes)}, or name data.tasks"
    where = "in all episodes" if len(episodes) == len(every) else f"in {len(episodes)} of {len(every)} episodes"
    message = f"{rows.sum()} of {len(rows)} rows, {where}, have no text: they are trained with an empty prompt"
    yield Finding("empty-prompts", "warning", "", (), message, way_out)


def _is_empty(sample: Any) -> bool:
    return isinstance(prompt := sample.get("prompt"), str) and not prompt.strip()


def _unused_prompts(data: LeRobotDatasetConfig, source: AnnotatedSource) -> Iterator[Finding]:
    if not data.prompt_from_task or not (others := source.other_prompts()):
        return
    shown = ", ".join(f"{name} ({_short(text)!r})" for name, text in list(others.items())[:MOST_LISTED])
    yield Finding(
        "other-prompts",
        "warning",
        "",
        (),
        f"the prompt is the text of task_index, but other columns have texts too, in the first row: {shown}",
        f"If one of them is the instruction, name it, as in data.prompt_column = {next(iter(others))!r}; "
        "data.prompt_column = 'task_index' keeps the prompt, without this warning",
    )


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + "..."


def _trained_splits(source: AnnotatedSource) -> Iterator[Finding]:
    trained = set(source.episodes.tolist())
    for name, held in source.named_splits().items():
        ours = trained.intersection(held)
        if not FOR_VALIDATION.fullmatch(name.lower()) or not ours or ours == trained:
            continue
        episodes = listed(ours, None)
        way_out = f"data.validation_episodes = {episodes} holds them out for validation"
        if KEPT_APART.fullmatch(name.lower()):
            way_out = f"data.exclude_episodes = {episodes} leaves them out, data.validation_episodes validates on them"
        message = (
            f"meta/info.json names {len(ours)} of the training episodes, {listed(ours)}, as the split {_short(name)!r}"
        )
        yield Finding("split-trained-on", "warning", "", (), message, way_out)


def listed(episodes: Iterable[int] | NDArray[np.int64], most: int | None = MOST_LISTED) -> str:
    """Episodes as `data.exclude_episodes` takes them: `[2, 3, "7-90"]`.

    Args:
        episodes: Their numbers.
        most: Entries to show; None: all.
    """
    runs = [
        [number for _, number in run]
        for _, run in groupby(enumerate(sorted(map(int, episodes))), lambda pair: pair[1] - pair[0])
    ]
    entries: list[str] = []
    for run in runs:
        entries += [f'"{run[0]}-{run[-1]}"'] if len(run) > 2 else [str(number) for number in run]
    more = ["..."] if most is not None and len(entries) > most else []
    return f"[{', '.join(entries[:most] + more)}]"
