"""The statistics of a run: rank 0 reads or computes them before the first step, and diagnoses them. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from rlinf_core.contract.datasets import LeRobotDatasetConfig, NamingSource, SampleSource
from rlinf_core.contract.run import RunConfig
from rlinf_core.data.normalize import Mode, NormStats, Origin, Stats, Vector, load_with_origin, save_norm_stats
from rlinf_core.data.pipeline import Pipeline, build_pipeline
from rlinf_core.data.statistics.action_kind import diagnose_actions
from rlinf_core.data.statistics.compute import ROWS_WITH_IMAGES, Distribution, stats_fingerprint, summarize
from rlinf_core.data.statistics.diagnose import Finding, compare_origins, compare_with_data
from rlinf_core.data.statistics.meaning import diagnose_meaning, diagnose_quantiles
from rlinf_core.data.statistics.names import name_dimensions
from rlinf_core.data.statistics.relative import diagnose_relative
from rlinf_core.data.transforms import Transform
from rlinf_core.errors import UserError
from rlinf_core.files import write_bytes
from rlinf_core.terminal import print_progress, warn

if TYPE_CHECKING:
    from rlinf_core.contract.process_group import ProcessGroup


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """The statistics of a run, the distributions of its data, and the findings about both."""

    stats: dict[str, NormStats]
    origin: Origin
    mode: Mode
    distributions: dict[str, Distribution]
    findings: tuple[Finding, ...]
    """Errors first."""

    def refuse(self) -> None:
        """Raise `UserError` if there are errors."""
        errors = [str(finding) for finding in self.findings if finding.severity == "error"]
        if errors:
            raise UserError("\n".join(errors))


class Prepared(NamedTuple):
    """The statistics of a run, and what their computation showed."""

    stats: Stats | None
    """None if the policy does not normalise."""
    findings: tuple[Finding, ...] = ()
    """Warnings."""
    state: tuple[Vector, Vector] | None = None
    """The smallest and the largest state, [D] each; None if it is not known."""


def run_statistics(
    run: RunConfig,
    source: SampleSource,
    group: ProcessGroup,
    *,
    resuming: bool,
    file: str = "norm_stats.json",
    recorded: Path | None = None,
    allow_other_rows: bool = False,
) -> Prepared:
    """The statistics of this run, saved in its folder, and warnings about them.

    Args:
        run: The run.
        source: Training rows.
        group: All ranks call this function, and wait for rank 0 without a timeout.
        resuming: The run continues from a checkpoint, whose weights need the statistics that they were trained with.
        file: File name in the run's folder, `RunSource.statistics`.
        recorded: The copy in the checkpoint; None if the run begins, or an early version saved the checkpoint.
        allow_other_rows: A run that continues may do so on other rows: with the statistics that its weights were
            trained with, whose file then records the other rows as well.

    Returns:
        The statistics. There are warnings and a range of states when a run begins, not when it continues.

    Raises:
        UserError: The statistics would spoil the run; or it continues and they are missing or no longer fit the data.
    """
    if run.policy.normalization == "none":
        return Prepared(None)
    path = run.folder / file

    def prepare() -> Prepared:
        if resuming:
            found = resumed_statistics(run, source, path, recorded, allow_other_rows=allow_other_rows)
            if recorded and not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                write_bytes(path, recorded.read_bytes())
            if allow_other_rows:
                _record_rows(run, source, path)
            return Prepared(found)
        diagnosis = diagnose(run, source, computed=path)
        diagnosis.refuse()
        save_norm_stats(path, diagnosis.stats, diagnosis.origin)
        state = diagnosis.distributions.get("state")
        extremes = (state.running.low, state.running.high) if state else None
        return Prepared(diagnosis.stats, diagnosis.findings, extremes)

    return group.decide(prepare)


def resumed_statistics(
    run: RunConfig,
    source: SampleSource,
    path: Path,
    recorded: Path | None = None,
    *,
    allow_other_rows: bool = False,
) -> dict[str, NormStats]:
    """The statistics that a run began with, see `trained_statistics`.

    Raises:
        UserError: They were computed from other rows, which is not allowed; or from other transforms or another
            horizon, which never is.
    """
    stats, origin = trained_statistics(path, recorded)
    if run.data.given_statistics():
        return stats
    now = _origin(run, source, _transforms(run))
    known = {origin.fingerprint} | ({load_with_origin(path)[1].fingerprint} if path.exists() else set())
    if now.fingerprint in known:
        return stats
    if not allow_other_rows or now.horizon != origin.horizon:
        way_on = "or continue on the rows of now with the statistics of before (--allow-change), "
        raise UserError(
            f"{path} was computed from other rows, other transforms or another horizon, so the run cannot continue "
            f"with it. Restore the dataset, its settings or its plugin, {way_on * (now.horizon == origin.horizon)}or "
            "use another runner.name"
        )
    distributions = summarize_by_name(run, source, _transforms(run))
    mode: Any = run.policy.normalization  # Not "none": the run has statistics.
    findings = compare_with_data(stats, distributions, mode)
    if errors := [str(finding) for finding in findings if finding.severity == "error"]:
        raise UserError("\n".join([f"{path} does not fit the rows of now, so the run cannot continue:", *errors]))
    return stats


def _record_rows(run: RunConfig, source: SampleSource, path: Path) -> None:
    """Write into a file of statistics that the run continues with it on other rows than it was computed from."""
    stats, origin = load_with_origin(path)
    now = _origin(run, source, _transforms(run))
    if not run.data.given_statistics() and now.fingerprint != origin.fingerprint:
        save_norm_stats(path, stats, replace(origin, fingerprint=now.fingerprint))
        warn(
            f"the training rows have changed ({origin.rows} when {path} was computed, {now.rows} now): the run "
            "continues on the rows of now, with the statistics that its weights were trained with"
        )


def trained_statistics(path: Path, recorded: Path | None = None) -> tuple[dict[str, NormStats], Origin]:
    """The statistics that a checkpoint was trained with.

    Args:
        path: The file in the run's folder. It may be missing if there is a copy.
        recorded: The copy in the checkpoint; None if an early version saved the checkpoint, without one.

    Raises:
        UserError: The file cannot be read, is not equal to the copy, or contains NaN or infinity.
    """
    way_out = f"copy {recorded} to {path}" if recorded else f"restore {path} from a backup"
    way_out = f"The weights need the statistics that they were trained with: {way_out}"
    if recorded and not path.exists():
        return load_with_origin(recorded)
    try:
        found = load_with_origin(path, way_out)
    except UserError as error:
        raise (error if way_out in str(error) else UserError(f"{error}. {way_out}")) from error
    trained = load_with_origin(recorded) if recorded else found
    if changed := _first_difference(trained[0], found[0]):
        raise UserError(f"{path} has changed since its checkpoint was trained with it: {changed}. {way_out}")
    for key, stats in trained[0].items():
        for name, values in vars(stats).items():
            absent = name.startswith("q") and np.isnan(values).all()
            if not absent and not np.isfinite(values).all():
                raise UserError(f"{path} contains NaN or infinity: {key}.{name}. {way_out}")
    return trained


def _first_difference(trained: Stats, found: Stats) -> str:
    """The first number that differs, in words; empty if none does."""
    if missing := trained.keys() ^ found.keys():
        return f"only one of them has {min(missing)!r}"
    for key, stats in trained.items():
        for name, before in vars(stats).items():
            now = getattr(found[key], name)
            if before.shape != now.shape:
                return f"{key}.{name} had {len(before)} numbers, now {len(now)}"
            for index in np.flatnonzero(~np.isclose(before, now, rtol=0, atol=0, equal_nan=True))[:1]:
                return f"{key}.{name}[{index}] was {before[index]:g}, now {now[index]:g}"
    return ""


def diagnose(
    run: RunConfig, source: SampleSource, *, rows: int | None = None, computed: Path | None = None
) -> Diagnosis:
    """The statistics that a run would begin with, given or computed, and the findings about them.

    Args:
        run: The run; its policy normalises.
        source: Training rows.
        rows: Use at most about this many rows, evenly spread.
        computed: A file that may already contain them; if they still fit, images are not decoded again.

    Raises:
        UserError: A file is missing or damaged, or statistics cannot be computed.
    """
    if run.policy.normalization == "none":
        raise UserError(f"the policy {run.policy.type!r} does not normalise: it needs no statistics")
    mode, images, transforms = run.policy.normalization, run.data.stats_need_images, _transforms(run)
    findings: list[Finding] = []
    origin = _origin(run, source, transforms)
    stats: dict[str, NormStats] | None = None
    if given := run.data.given_statistics():
        stats, recorded = load_with_origin(Path(given).expanduser())
        findings += compare_origins(recorded, origin)
        findings += diagnose_quantiles(recorded, mode)
        origin = recorded
    elif images and computed and computed.exists():
        known, recorded = load_with_origin(computed)
        same = (recorded.fingerprint, recorded.norm_floor) == (origin.fingerprint, run.data.norm_floor)
        stats = known if same else None
    if images and stats is not None:
        rows = ROWS_WITH_IMAGES  # Enough to compare.
    distributions = summarize_by_name(run, source, transforms, rows=rows)
    if stats is None:
        stats = {key: one.stats for key, one in distributions.items()}
    stats = {
        key: one.cut(len(distributions[key].stats.mean)) if key in distributions else one for key, one in stats.items()
    }
    if run.data.norm_floor:
        stats = {key: one.floored(run.data.norm_floor) for key, one in stats.items()}
    findings += compare_with_data(stats, distributions, mode)
    if not images:
        findings += diagnose_actions(source, transforms)
        findings += diagnose_relative(source, transforms, _recorded_names(run, source), distributions)
        findings += diagnose_meaning(run.data, source, transforms)
    for id, message, way_out, key, dimensions in run.policy.contradictions(run.data, stats):
        findings.append(Finding(id, "warning", key, dimensions, message, way_out))
    names = {key: one.names for key, one in distributions.items()}
    findings = [replace(one, names=names.get(one.key, ())) for one in findings]
    findings.sort(key=lambda finding: finding.severity != "error")
    origin = Origin(**(vars(origin) | {"norm_floor": max(run.data.norm_floor, origin.norm_floor)}))
    return Diagnosis(stats, origin, mode, distributions, tuple(findings))


def diagnosed_pipeline(
    run: RunConfig, source: SampleSource, *, rows: int | None = None, computed: Path | None = None
) -> tuple[Pipeline, Diagnosis | None]:
    """The pipeline that encodes as the run would, and the diagnosis of its statistics.

    Args:
        run: The run.
        source: Training rows, whichever split is encoded.
        rows: See `diagnose`.
        computed: See `diagnose`.

    Returns:
        The pipeline, also if the diagnosis has errors; and None if the policy does not normalise.
    """
    diagnosis = None
    if run.policy.normalization != "none":
        diagnosis = diagnose(run, source, rows=rows, computed=computed)
    return build_pipeline(run.data, run.policy, diagnosis.stats if diagnosis else None), diagnosis


def summarize_by_name(
    run: RunConfig, source: SampleSource, transforms: Sequence[Transform], *, rows: int | None = None
) -> dict[str, Distribution]:
    """The distributions of `state` and `actions`, see `summarize`, with the dataset's names of their dimensions."""
    with print_progress("statistics", "rows") as progress:
        found = summarize(source, transforms, read_images=run.data.stats_need_images, rows=rows, progress=progress)
    names = name_dimensions(run.data, source, transforms)
    return {key: replace(one, names=names.get(key, ())) for key, one in found.items()}


def _recorded_names(run: RunConfig, source: SampleSource) -> dict[str, tuple[str, ...]]:
    """What the dataset calls the recorded numbers, before the transforms."""
    if not isinstance(source, NamingSource) or not isinstance(run.data, LeRobotDatasetConfig):
        return {}
    return {"state": source.names_of(run.data.state), "actions": source.names_of(run.data.actions)}


def _transforms(run: RunConfig) -> Sequence[Transform]:
    """All transforms before normalisation."""
    return (run.data.repack(), *run.data.transforms())


def _origin(run: RunConfig, source: SampleSource, transforms: Sequence[Transform]) -> Origin:
    horizon = run.policy.chunk_length()
    return Origin(
        fingerprint=stats_fingerprint(source, transforms, horizon, read_images=run.data.stats_need_images),
        dataset=run.data.repo_id,
        rows=len(source),
        episodes=len(np.unique(source.episodes)),
        horizon=horizon,
    )
