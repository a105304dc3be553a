"""All checks of a run that are possible before it starts: no device is touched and torch is not imported.

Every check adds facts, warnings, or findings that would end the run; a failed check does not stop the others.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from rlinf_core.config.load import with_begun
from rlinf_core.contract.datasets import (
    DatasetConfig,
    DecodingSource,
    LeRobotDatasetConfig,
    ReportingSource,
    SampleSource,
)
from rlinf_core.contract.run import RunConfig, RunSource
from rlinf_core.contract.tables.cluster import LAUNCHERS, SLURM, check_world_size
from rlinf_core.data.loading.chunked_sampling import check_streams, chunks_of
from rlinf_core.data.loading.sampling import check_batch, sample_generator, steps_per_epoch
from rlinf_core.data.normalize import load_norm_stats
from rlinf_core.data.splits import describe_splits, open_split
from rlinf_core.data.statistics.preview import encode_without_images, preview_samples
from rlinf_core.data.statistics.rates import compare_rates, describe_chunk
from rlinf_core.data.statistics.run import diagnosed_pipeline
from rlinf_core.errors import UserError, did_you_mean
from rlinf_core.plugins.evaluators import evaluator_names
from rlinf_core.plugins.registry import Plugins
from rlinf_core.slurm import processes_per_node
from rlinf_core.training.checkpoint.image_files import compare_images, record_images
from rlinf_core.training.distributed.open_files import count_open_files, find_limit, too_few
from rlinf_core.training.resume import Flags, Start, decide_start
from rlinf_core.training.run_folder import read_folder
from rlinf_core.training.settings import Fsdp2Settings
from rlinf_core.training.stopping import compared_metric

DIAGNOSED_ROWS = 65_536
"""Most rows whose statistics are diagnosed; the run itself uses all."""


@dataclass
class Report:
    """The results of the checks."""

    facts: dict[str, int | float | str] = field(default_factory=dict)
    """In the order of checking."""
    findings: list[str] = field(default_factory=list)
    """Problems that would end the run, each with its way out."""
    warnings: list[str] = field(default_factory=list)
    """Problems that may degrade it, each with its way out."""

    def refusal(self, config: str) -> str:
        """All findings in one message; `config` is the path of the TOML file."""
        lines = "".join(f"\n  {finding.replace(chr(10), chr(10) + '  ')}" for finding in self.findings)
        return f"{config} would not run:{lines}"

    @contextmanager
    def checking(self) -> Iterator[None]:
        """Record a `UserError` of the body as a finding; the same error from two checks only once."""
        try:
            yield
        except UserError as error:
            found = str(error)
            if not any(found in finding for finding in self.findings):
                self.findings = [*(finding for finding in self.findings if finding not in found), found]

    @contextmanager
    def of_source(self, name: str) -> Iterator[Report]:
        """A report for one source that is added to this one, in a mixture with the source's name as prefix."""
        part = Report()
        yield part
        before = f"{name}: " if name else ""
        self.facts |= {f"{before}{key}": fact for key, fact in part.facts.items()}
        for ours, theirs in ((self.findings, part.findings), (self.warnings, part.warnings)):
            ours += [f"{before}{text}" for text in theirs if f"{before}{text}" not in ours]


def check_run(run: RunConfig, plugins: Plugins, ranks: int | None = None, *, allow_change: bool = False) -> Report:
    """Check everything about a run that needs no device.

    Args:
        run: The validated config.
        plugins: The loaded plugins.
        ranks: Number of processes; None: the number that `[cluster]` gives, if it does.
        allow_change: Whether an existing run may continue with a config that changes what a step computes.
    """
    report = Report({"run": str(run.folder)})
    with report.checking():
        run = with_begun(run)
    with report.checking():
        plugins.hook.rlinf_configure(run=run)
    rows: list[tuple[RunSource, SampleSource]] = []
    for source in run.sources:
        with report.of_source(source.name) as part:
            found = _check_data(source.run, plugins, part)
            rows += [(source, found)] if found is not None else []
    _check_batch(run, ranks, report)
    total = sum(len(train) for _, train in rows)
    if len(rows) == len(run.sources):
        _check_length(run, total, report)
    for source, train in rows:
        with report.of_source(source.name) as part:
            if source.name and len(rows) == len(run.sources):
                part.facts["drawn"] = source.drawn(len(train), total)
            if chunk := describe_chunk(source, train):
                part.facts["chunk"] = chunk
            _check_sample(source.run, train, part)
    if len(rows) == len(run.sources):
        report.warnings += compare_rates(rows)
    with report.checking():
        report.facts["weights"] = run.policy.weights or "initial values"
        run.policy.check_files()
        report.warnings += run.policy.unchecked_files()
    with report.checking():
        if described := run.policy.describe_lora():
            report.facts["adapters"] = described
    with report.checking():
        if run.runner.val_check_interval:
            compared_metric(run, plugins)
    with report.checking():
        start = _check_folder(run, report, allow_change=allow_change)
        if start.checkpoint and len(rows) == len(run.sources):
            images = record_images((source.name, train) for source, train in rows)
            if changes := compare_images(start.checkpoint, images, allow_change=allow_change):
                report.warnings.append(f"the run continues with other image files: {changes}")
    with report.checking():
        report.facts["launcher"] = run.cluster.launcher
        check_launcher(run, plugins)
    report.warnings += filter(None, [run.cluster.unused])
    if plugins.failures:
        report.facts["plugins_left_out"] = "; ".join(map(str, plugins.failures))
    if run.runner.val_check_interval:
        report.facts["evaluators"] = ", ".join(evaluator_names(run))
    if isinstance(run.trainer, Fsdp2Settings):
        _check_machines(run, run.trainer, report)
        report.facts["compiled_blocks"] = run.trainer.compile_fact
    report.facts["loggers"] = ", ".join(dict.fromkeys(("console", "jsonl", *run.runner.loggers)))
    return report


def _check_data(run: RunConfig, plugins: Plugins, report: Report) -> SampleSource | None:
    """Open both splits; returns the training rows, or None if they cannot be opened."""
    report.facts["dataset"] = run.data.repo_id
    train = None
    with report.checking():
        train = open_split(run, plugins, "train")
        report.facts["training_rows"] = len(train)
        report.facts["training_episodes"] = len(np.unique(train.episodes))
        held_out = None
        if run.data.has_validation:
            held_out = open_split(run, plugins, "validation")
            report.facts["held_out_rows"] = len(held_out)
            report.facts["held_out_episodes"] = len(np.unique(held_out.episodes))
        report.facts["data"] = describe_splits(train, held_out)
        _check_images(run.data, train, report)
        if isinstance(train, ReportingSource):
            report.facts |= train.facts()
            report.warnings += train.warnings()
    return train


def _check_images(data: DatasetConfig, train: SampleSource, report: Report) -> None:
    """Check that images can be decoded, without decoding any, as that may need torch."""
    if isinstance(data, LeRobotDatasetConfig) and data.cache_dir and not data.cache:
        report.warnings.append('data.cache_dir does nothing here: set data.cache = "raw" or "jpeg" to read from there')
    if isinstance(train, DecodingSource) and (decoder := train.check_decoder()):
        report.facts["decoder"] = decoder


def _check_batch(run: RunConfig, ranks: int | None, report: Report) -> None:
    """Check that global batch = ranks x micro batch x accumulation."""
    whole, micro, nodes = run.trainer.global_batch_size, run.trainer.micro_batch_size, run.cluster.machines
    report.facts["global_batch_size"] = whole
    if ranks is not None:
        with report.checking():
            check_world_size(run.cluster, ranks)
    elif run.cluster.ranks is not None:
        ranks = len(run.cluster.ranks)
    with report.checking():
        if ranks is not None:
            report.facts["ranks"] = ranks
            run.trainer.check_ranks(ranks)
            report.facts["micro_batches_a_step"] = check_batch(whole, micro, ranks)
            check_streams(chunks_of(run.data), ranks)
        else:
            most = check_batch(whole, micro, nodes) * nodes
            fitting = [n for n in range(nodes, most + 1, nodes) if most % n == 0]
            report.facts["ranks_that_fit"] = ", ".join(map(str, fitting))


def _check_machines(run: RunConfig, trainer: Fsdp2Settings, report: Report) -> None:
    """Report how the model is sharded over several machines, and how many files the ranks open."""
    known, nodes = report.facts.get("ranks"), run.cluster.machines
    ranks = known if isinstance(known, int) else 0
    if nodes > 1:
        report.facts["sharding"] = trainer.describe_replicas(ranks, nodes)
    if ranks > 1 and ranks % nodes == 0:
        needed = count_open_files(ranks, trainer.replicas(ranks, nodes), run.data.num_workers)
        report.facts["open_files"] = f"up to {needed} per process; {find_limit()} are allowed here"
        report.warnings += filter(None, [too_few(needed, ranks)])


def _check_length(run: RunConfig, rows: int, report: Report) -> None:
    """Report how long an epoch and the run are."""
    with report.checking():
        epoch = steps_per_epoch(rows, run.trainer.global_batch_size)
        report.facts["steps_an_epoch"] = epoch
        report.facts["steps"] = run.runner.stop_step(epoch)
        report.facts["epochs"] = round(run.runner.stop_step(epoch) / epoch, 2)


def _check_sample(run: RunConfig, train: SampleSource, report: Report) -> None:
    """Make a sample of the first row as training will, but without its images: decoding them may need torch."""
    with report.checking():
        if run.data.stats_need_images:
            if given := run.data.given_statistics():
                load_norm_stats(Path(given).expanduser())
            report.facts["sample"] = "not tried: data.stats_need_images"
            return
        pipeline, diagnosis = diagnosed_pipeline(run, train, rows=DIAGNOSED_ROWS)
        if diagnosis:
            report.warnings += [str(finding) for finding in diagnosis.findings if finding.severity == "warning"]
            diagnosis.refuse()
        (sample,) = encode_without_images(train, pipeline, [0])
        drawn = run.policy.draw(sample_generator(run.seed, 0, 0))
        shapes = {key: np.shape(value) for key, value in {**sample, **drawn}.items() if np.ndim(value)}
        report.facts["sample"] = ", ".join(f"{key} {list(shape)}" for key, shape in shapes.items())
        for name, fact in run.policy.describe(preview_samples(train, pipeline)).items():
            if fact.startswith("warning: "):
                report.warnings.append(fact.removeprefix("warning: "))
            else:
                report.facts[name] = fact


def _check_folder(run: RunConfig, report: Report, *, allow_change: bool) -> Start:
    """Check that the folder can be written to, and report where the run would start if it holds one already."""
    start = decide_start(run, read_folder(run), Flags(allow_change=allow_change))
    report.facts["starts"] = "at step 0"
    if start.checkpoint:
        report.facts["starts"] = f"from checkpoint {start.checkpoint.name}" + ", finished" * start.finished
    for note in start.notes:
        heading, _, lines = note.partition("\n")
        if heading.startswith("warning: "):
            report.warnings.append(note.removeprefix("warning: "))
        else:
            report.facts[heading.rstrip(":").replace(" ", "_")] = "; ".join(map(str.strip, lines.splitlines()))
    return start


def check_launcher(run: RunConfig, plugins: Plugins) -> None:
    """Raise `UserError` if no installed plugin can provide `cluster.launcher`."""
    launching, naming = (
        {implementation.owner for implementation in plugins.implementations(hook)}
        for hook in ("rlinf_launch", "rlinf_launcher_names")
    )
    # One that does not name its launchers may provide any.
    if run.cluster.launcher not in _launchers(plugins) and launching <= naming:
        raise nobody_launches(run, plugins)
    if run.cluster.launcher == SLURM:
        processes_per_node(run)


def nobody_launches(run: RunConfig, plugins: Plugins) -> UserError:
    """The error for a `cluster.launcher` that no plugin provides."""
    name, there = run.cluster.launcher, _launchers(plugins)
    others = "".join(f", {owner} {launcher!r}" for launcher, owner in there.items() if launcher not in LAUNCHERS)
    core = " and ".join(map(repr, LAUNCHERS))
    lines = [
        f"no installed plugin launches with cluster.launcher = {name!r}{did_you_mean(name, there)}",
        f"install the package that provides it, or leave cluster.launcher out: core provides {core}{others}",
        *(f"failed: {failure}" for failure in plugins.failures),
        *(f"left out by RLINF_DISABLE_PLUGINS: {distribution}" for distribution in plugins.blocked),
    ]
    return UserError("\n  ".join(lines))


def _launchers(plugins: Plugins) -> dict[str, str]:
    """Values of `cluster.launcher` -> the distribution that provides it."""
    named = plugins.implementations("rlinf_launcher_names")
    return {name: one.owner.distribution for one in reversed(named) for name in one.call()}
