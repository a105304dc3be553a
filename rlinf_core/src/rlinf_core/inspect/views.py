"""The contents of the page: gathers what is shown of a run and its datasets. Draws nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from rlinf_core.config.load import with_begun
from rlinf_core.contract.datasets import ColumnSource, SampleSource
from rlinf_core.contract.run import RunConfig, RunSource
from rlinf_core.data.images.still import describe_still, still_camera
from rlinf_core.data.loading.chunked_sampling import ChunkedOrder, chunks_of
from rlinf_core.data.loading.mixture import Order
from rlinf_core.data.loading.sampling import steps_per_epoch
from rlinf_core.data.normalize import Mode, NormStats
from rlinf_core.data.pipeline import Pipeline
from rlinf_core.data.splits import open_splits
from rlinf_core.data.statistics.compute import Distribution
from rlinf_core.data.statistics.run import diagnosed_pipeline, summarize_by_name
from rlinf_core.errors import UserError
from rlinf_core.inspect.samples import SampleView, TrainingRow, choose, find, occurrences, view
from rlinf_core.plugins.registry import Plugins
from rlinf_core.preflight import DIAGNOSED_ROWS, Report, check_run
from rlinf_core.terminal import print_phase

DIAGNOSED_WITH_IMAGES = 512
SUMMARIZED_ROWS = 4096
EPISODES_ASKED = 4096
"""Maximum number of episodes whose task is read, for a source that cannot return columns."""


@dataclass(frozen=True)
class Task:
    """A task text, with counts."""

    text: str
    episodes: int
    rows: int
    held_out: int
    """Held-out episodes."""


@dataclass
class SourceView:
    """What is shown of a dataset."""

    name: str
    """Name in the mixture; otherwise empty."""
    dataset: str
    facts: dict[str, int | float | str] = field(default_factory=dict)
    lengths: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """[E], frames of each training episode."""
    held_out: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """[E'], frames of each held-out episode."""
    tasks: list[Task] = field(default_factory=list)
    tasks_of: int = 0
    """Number of training episodes whose task was read."""
    distributions: Mapping[str, Distribution] = field(default_factory=dict)
    """`state` and `actions`, after the dataset's transforms."""
    stats: Mapping[str, NormStats] = field(default_factory=dict)
    mode: Mode | None = None
    """How the policy normalises."""
    samples: list[SampleView] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """Why a part is missing."""


@dataclass(frozen=True)
class RunView:
    """What is shown of a run."""

    run: RunConfig
    report: Report
    facts: dict[str, int | float | str]
    """Facts about the run as a whole."""
    sources: list[SourceView]

    @property
    def errors(self) -> list[str]:
        """Everything that would end the run, including rows that cannot be read."""
        own = [text for source in self.sources for text in (*source.problems, *(s.problem for s in source.samples))]
        new = [text for text in own if text and not any(text in found for found in self.report.findings)]
        return [*self.report.findings, *dict.fromkeys(new)]

    @property
    def warnings(self) -> list[str]:
        """Everything that may spoil the run, including truncated texts in the rows shown."""
        found = []
        for source in self.sources:
            cut = [text.cut for sample in source.samples for text in sample.illustration.texts if text.cut]
            if cut:
                message = (
                    f"{len(cut)} texts of the {len(source.samples)} samples shown are truncated: "
                    f"up to {max(cut)} tokens of a text never reach the model"
                )
                found.append(f"{source.name}: {message}" if source.name else message)
            prefix = f"{source.name}: " if source.name else ""
            found += [prefix + still_camera(name, what) for name, what in still_among(source.samples).items()]
        return [*self.report.warnings, *found]


def inspect_run(run: RunConfig, plugins: Plugins, at: Sequence[tuple[str, int, int]] = ()) -> RunView:
    """Gather everything that the page shows.

    Args:
        run: The validated config.
        plugins: The loaded plugins.
        at: Rows to show instead of the default selection: source, episode, frame.

    Raises:
        UserError: A row of `at` does not exist.
    """
    run = with_begun(run)
    print_phase("opening the data")
    opened = [_open(source, plugins) for source in run.sources]  # Kept open, so that check_run need not reopen them.
    print_phase("checking data, statistics and files")
    report = check_run(run, plugins)
    order, steps = _order(run, opened)
    views, facts = [], dict(report.facts)
    for number, (source, rows) in enumerate(zip(run.sources, opened, strict=True)):
        shown = SourceView(source.name, source.run.data.repo_id)
        if source.name:
            prefix = f"{source.name}: "
            own = {key: fact for key, fact in facts.items() if key.startswith(prefix)}
            shown.facts = {key.removeprefix(prefix): fact for key, fact in own.items()}
            facts = {key: fact for key, fact in facts.items() if key not in own}
        if rows is not None:
            requested = [(episode, frame) for name, episode, frame in at if name == source.name]
            chosen = [find(rows.train, *one, rows.held_out) for one in requested]
            _fill(shown, source, rows, chosen, (order, steps, number))
        views.append(shown)
    return RunView(run, report, facts, views)


@dataclass(frozen=True)
class _Opened:
    train: SampleSource
    held_out: SampleSource | None


def still_among(samples: Sequence[SampleView]) -> dict[str, str]:
    """Cameras whose recorded images are the same in all samples shown."""
    recorded: dict[str, list[NDArray[np.uint8]]] = {}
    for camera in (camera for sample in samples for camera in sample.cameras if camera.pictures):
        recorded.setdefault(camera.name, []).append(camera.pictures[0].pixels)
    return {name: what for name, images in recorded.items() if (what := describe_still(images))}


def _open(source: RunSource, plugins: Plugins) -> _Opened | None:
    """Both splits; None if they cannot be opened, which `check_run` reports."""
    try:
        return _Opened(*open_splits(source.run, plugins))
    except UserError:
        return None


def _order(run: RunConfig, opened: Sequence[_Opened | None]) -> tuple[Order | ChunkedOrder | None, int]:
    """The run's sampling order and its steps per epoch; (None, 0) if the data cannot be used, see `check_run`."""
    rows = tuple(len(one.train) for one in opened if one)
    batch = run.trainer.global_batch_size
    if len(rows) < len(opened) or sum(rows) < batch:
        return None, 0
    steps = steps_per_epoch(sum(rows), batch)
    if (chunks := chunks_of(run.data)) and opened[0]:
        return ChunkedOrder.of(run.seed, opened[0].train, steps * batch, chunks), steps
    return Order(run.seed, rows, tuple(source.share for source in run.sources), steps * batch), steps


def _fill(
    shown: SourceView,
    source: RunSource,
    rows: _Opened,
    chosen: Sequence[TrainingRow],
    ordered: tuple[Order | ChunkedOrder | None, int, int],
) -> None:
    """Fill the view of a dataset.

    Args:
        shown: The view.
        source: The dataset.
        rows: Its splits.
        chosen: The rows to show; empty: a default selection.
        ordered: The run's sampling order, its steps per epoch, and the source's number in it.
    """
    shown.lengths = _lengths(rows.train)
    shown.held_out = _lengths(rows.held_out) if rows.held_out else shown.held_out
    tasks = _tasks(rows.train)
    shown.tasks, shown.tasks_of = _count_tasks(rows, tasks), len(tasks)
    prefix = f"{source.name}: " if source.name else ""
    print_phase(f"{prefix}statistics of {len(rows.train)} training rows")
    pipeline = _statistics(source.run, rows.train, shown)
    if pipeline is None:
        return
    print_phase(f"{prefix}reading the samples to show")
    order, steps, number = ordered
    stop_step = source.run.runner.stop_step(steps)
    for row in chosen or choose(rows.train, tasks):
        uses = list(occurrences(order, steps, stop_step, number, row.index)) if order else []
        shown.samples.append(view(source.run, rows.train, pipeline, row, uses))


def _statistics(run: RunConfig, train: SampleSource, shown: SourceView) -> Pipeline | None:
    """Summarize the numbers; the pipeline with the statistics of the run, or None if there can be none."""
    try:
        images = run.data.stats_need_images
        pipeline, diagnosis = diagnosed_pipeline(run, train, rows=DIAGNOSED_WITH_IMAGES if images else DIAGNOSED_ROWS)
        if diagnosis is None:
            transforms = (run.data.repack(), *run.data.transforms())
            most = DIAGNOSED_WITH_IMAGES if images else SUMMARIZED_ROWS
            shown.distributions = summarize_by_name(run, train, transforms, rows=most)
            return pipeline
        shown.distributions, shown.mode = diagnosis.distributions, diagnosis.mode
        diagnosis.refuse()
        shown.stats = diagnosis.stats
        return pipeline
    except UserError as error:
        shown.problems.append(str(error))
        return None


def _lengths(source: SampleSource) -> NDArray[np.int64]:
    return np.unique(source.episodes, return_counts=True)[1]


def _tasks(source: SampleSource) -> dict[int, str]:
    """Episode -> the task of its first row; empty for data without tasks."""
    episodes, first = np.unique(source.episodes, return_index=True)
    if isinstance(source, ColumnSource):
        texts = source.columns(first.tolist()).get("task", [])
    else:
        chosen = np.linspace(0, len(first) - 1, min(EPISODES_ASKED, len(first))).astype(np.int64)
        episodes = episodes[chosen]
        found = source.without_images(first[chosen].tolist())
        texts = [row["task"] for row in found if "task" in row]
    return dict(zip(episodes.tolist(), texts, strict=True)) if len(texts) else {}


def _count_tasks(rows: _Opened, tasks: Mapping[int, str]) -> list[Task]:
    """Tasks, those with the most episodes first."""
    numbers, lengths = np.unique(rows.train.episodes, return_counts=True)
    length = dict(zip(numbers.tolist(), lengths.tolist(), strict=True))
    episodes, frames = Counter(tasks.values()), Counter[str]()
    for episode, text in tasks.items():
        frames[text] += length[episode]
    held_out = Counter(_tasks(rows.held_out).values() if rows.held_out else ())
    counted = [Task(text, episodes[text], frames[text], held_out[text]) for text in {**episodes, **held_out}]
    return sorted(counted, key=lambda task: (-task.episodes, task.text))
