"""Render the page: one HTML file that loads nothing from elsewhere and runs no script."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rlinf_core.errors import UserError
from rlinf_core.pages.one_file import OneFile
from rlinf_core.plots.actions import dimension_name, plot_error_map, plot_predictions
from rlinf_core.report.plots import Kind, Line, Panel, plot_panels, plot_time
from rlinf_core.report.runs import PHASES, RunRecord, config_differences, time_shares
from rlinf_core.results import (
    ACTIONS,
    EMA,
    IMAGES,
    TABLE,
    TEXTS,
    VIDEOS,
    ActionErrors,
    EvaluationFiles,
    ResultTable,
    read_action_errors,
    read_table,
)

PAGE = OneFile("rlinf report")
MOST_ROWS = 200
"""Rows of a table on the page."""
MOST_ANOMALIES = 50
MOST_PANELS = 40
"""Metrics that are drawn besides those that every run has."""
LONGEST_TEXT = 20_000
"""Characters of a text of an evaluator."""
WIDEST = 320
"""Maximum width of an image on the page, in pixels."""
IMAGE_BYTES, VIDEO_BYTES = 1_000_000, 2_500_000
"""Bytes of images and of videos that the page holds at most; others are named."""
MIME = {".mp4": "video/mp4", ".webm": "video/webm"}
BASELINES = ("_mean", "_repeat")
"""Ends of the names of `val_action_mse`'s baselines."""


@dataclass
class Room:
    """What the page can still hold."""

    images: int = IMAGE_BYTES
    videos: int = VIDEO_BYTES


@dataclass
class Shown:
    """An evaluation, or the part of one in a subfolder, as the page shows it."""

    title: str
    anchor: str
    tables: list[ResultTable] = field(default_factory=list)
    images: list[tuple[str, str]] = field(default_factory=list)
    videos: list[tuple[str, str]] = field(default_factory=list)
    texts: list[tuple[str, str]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    """Files that the page does not hold, and why."""


def render(runs: Sequence[RunRecord]) -> str:
    """The page of one run, or of several beside one another."""
    from markupsafe import Markup

    names = _names(runs)
    single = len(runs) == 1
    return PAGE.render(
        Path(__file__).with_name("report.html"),
        {"svg": lambda plot: Markup(plot.svg)},
        runs=list(zip(names, runs, strict=True)),
        single=single,
        facts=_facts(runs),
        figures=list(_figures(runs, names)),
        time=[
            (name, plot_time(f"time{number}", shares))
            for number, (name, run) in enumerate(zip(names, runs, strict=True))
            if (shares := time_shares(run))
        ],
        errors=[one for number, run in enumerate(runs) for one in _action_errors(names[number], number, run, single)],
        evaluations=_evaluations(runs, names),
        batches=_first_batches(runs, names),
        differences=config_differences(runs) if not single else [],
        most_anomalies=MOST_ANOMALIES,
        most_rows=MOST_ROWS,
    )


def _names(runs: Sequence[RunRecord]) -> list[str]:
    """The runs' names; with the folder if two have the same."""
    names = [run.name for run in runs]
    return [name if names.count(name) == 1 else str(run.folder) for name, run in zip(names, runs, strict=True)]


def _facts(runs: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """Facts of each run, a row each; those that no run has are left out."""
    columns = [_facts_of(run) for run in runs]
    rows = [
        (name, [one.get(name, "") for one in columns]) for name in dict.fromkeys(key for one in columns for key in one)
    ]
    return [(name, values) for name, values in rows if any(values)]


def _facts_of(run: RunRecord) -> dict[str, str]:
    training, environment = run.training, run.environment
    data, policy = run.config.get("data", {}), run.config.get("policy", {})
    trained = f"{policy.get('type', '?')} on {data.get('repo_id') or data.get('config_name', '?')}"
    limit = run.config.get("runner", {}).get("max_steps")
    seconds = training["step_seconds"].values if "step_seconds" in training else np.zeros(0)
    facts = {
        "trained": trained,
        "state": _state(run),
        "steps": f"{run.step}{f' of {limit}' if limit else ''}",
        "time in steps": _duration(float(np.nansum(seconds))) if len(seconds) else "",
        "samples per step": str(run.config.get("trainer", {}).get("global_batch_size", "")),
        "samples/s": _median(run, "samples_per_second", "{:.4g}"),
        "MFU": _median(run, "mfu", "{:.1%}"),
        "TFLOP/s per rank": _median(run, "tflops_per_second", "{:.4g}"),
        "peak memory": f"{training['peak_memory_gb'].last:.3g} GB" if "peak_memory_gb" in training else "",
        "skipped steps": f"{np.nansum(training['skipped'].values):.0f}" if "skipped" in training else "",
        "loss": f"{training['loss'].last:.4g}" if "loss" in training else "",
    }
    facts |= {name: _validated(curve) for name, curve in run.validation.items() if not name.endswith(BASELINES)}
    facts |= {
        "checkpoints": ", ".join(str(int(name.removeprefix("step_"))) for name in run.checkpoints),
        "device": f"{environment.get('ranks', '?')} x {environment.get('device', '?')}" if environment else "",
        "started": str(environment.get("started", "")),
        "commit": str(environment.get("commit", "")),
    }
    return facts


def _state(run: RunRecord) -> str:
    if not run.end:
        return "training, or killed"
    text = str(run.end.get("message", "")).strip().splitlines()
    return f"{run.end.get('reason', '?')}{': ' + text[0] if text else ''}"


def _validated(curve: Any) -> str:
    """The last value of a validation metric, and the smallest and largest."""
    finite = curve.values[np.isfinite(curve.values)]
    if not len(finite):
        return ""
    if len(finite) == 1:
        return f"{finite[0]:.4g}"
    return f"{finite[-1]:.4g} (from {finite.min():.4g} to {finite.max():.4g})"


def _median(run: RunRecord, name: str, form: str) -> str:
    curve = run.training.get(name)
    finite = curve.values[np.isfinite(curve.values)] if curve else np.zeros(0)
    return f"{form.format(float(np.median(finite)))} (median)" if len(finite) else ""


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{round(seconds):02d}"


def _figures(runs: Sequence[RunRecord], names: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """The curves under their headings."""
    single = len(runs) == 1
    training = {
        "Loss": [("loss", True), ("lr", False), ("grad_norm", True)],
        "Throughput": [
            *(("samples_per_second", False), ("mfu", False), ("tflops_per_second", False)),
            *(("data_wait_share", False), ("peak_memory_gb", False)),
        ],
    }
    drawn = {"skipped", "epoch", "step_seconds", *(f"{phase}_share" for phase in PHASES)}
    for heading, metrics in training.items():
        drawn |= {name for name, _ in metrics}
        panels = [panel for name, log in metrics if (panel := _training_panel(runs, names, name, logarithmic=log))]
        if heading == "Loss":
            panels[1:1] = _validation_panels(runs, names)
        if panels:
            yield heading, plot_panels(f"curves-{heading.lower()}", panels, bands=single)
    others = sorted({name for run in runs for name in run.training} - drawn)
    panels = [panel for name in others if (panel := _training_panel(runs, names, name))][:MOST_PANELS]
    if panels:
        yield "Other metrics of steps", plot_panels("curves-others", panels, bands=single)


def _training_panel(
    runs: Sequence[RunRecord], names: Sequence[str], metric: str, *, logarithmic: bool = False
) -> Panel | None:
    lines = [
        Line(run.training[metric], number, label=names[number] if len(runs) > 1 else "")
        for number, run in enumerate(runs)
        if metric in run.training and np.isfinite(run.training[metric].values).any()
    ]
    return Panel(metric, lines, logarithmic) if lines else None


def _validation_panels(runs: Sequence[RunRecord], names: Sequence[str]) -> list[Panel]:
    """A panel per validation metric, with that of averaged weights and with baselines."""
    metrics = dict.fromkeys(name.removeprefix(EMA) for run in runs for name in run.validation)
    panels = []
    for metric in metrics:
        base, _, source = metric.partition("/")
        if base.endswith(BASELINES) and base.rpartition("_")[0] + f"/{source}" * bool(source) in metrics:
            continue
        lines = []
        for number, run in enumerate(runs):
            several = len(runs) > 1  # Then colours are runs, and styles are explained below the figure.
            for name, kind, label in _variants(metric):
                if (curve := run.validation.get(name)) is not None:
                    said = label if not several else names[number] * (kind == "")
                    lines.append(Line(curve, number, kind, said))
        panels.append(Panel(metric, lines if len(lines) > 1 else [Line(lines[0].curve, lines[0].run, lines[0].kind)]))
    return panels[:MOST_PANELS]


def _variants(metric: str) -> Iterator[tuple[str, Kind, str]]:
    """A validation metric, that of averaged weights, and its baselines: name, style and label."""
    base, _, source = metric.partition("/")
    source = f"/{source}" * bool(source)
    yield metric, "", "current weights"
    yield EMA + metric, "average", "averaged weights"
    yield f"{base}_mean{source}", "mean", "mean action"
    yield f"{base}_repeat{source}", "repeat", "repeated action"


@dataclass(frozen=True)
class ErrorsView:
    """Action errors of a dataset, of the last evaluation of each set of weights."""

    title: str
    step: int
    error_map: Any
    predictions: Any
    where: list[str]
    table: ResultTable


def _action_errors(name: str, number: int, run: RunRecord, single: bool) -> Iterator[ErrorsView]:
    """The action errors of a run's last evaluations, current and averaged weights together."""
    found: dict[tuple[str, str, int], dict[str, ActionErrors]] = {}
    for evaluation in run.latest():
        for file, path in evaluation.files.items():
            if not file.endswith(ACTIONS):
                continue
            try:
                one = read_action_errors(path)
            except UserError:
                continue  # It is among the files that are left out, with the reason.
            weights = "averaged weights" if evaluation.ema else "current weights"
            found.setdefault((evaluation.evaluator, file.removesuffix(ACTIONS), evaluation.step), {})[weights] = one
    for place, ((evaluator, of, step), errors) in enumerate(found.items()):
        last = list(errors.values())[-1]
        what = evaluator if of == evaluator else f"{evaluator}, {of}"
        plots = f"errors{number}-{place}"
        yield ErrorsView(
            title=what if single else f"{name}: {what}",
            step=step,
            error_map=plot_error_map(f"{plots}-map", errors),
            predictions=plot_predictions(f"{plots}-chunks", last) if last.chunks else None,
            where=[chunk.where for chunk in last.chunks],
            table=_error_table(errors),
        )


def _error_table(errors: Mapping[str, ActionErrors]) -> ResultTable:
    """RMSE per dimension, over all steps, of each set of weights and of the baselines."""
    first = next(iter(errors.values()))
    columns = {label: _over_steps(one.rmse, one) for label, one in errors.items()}
    columns |= {label: _over_steps(matrix, first) for label, matrix in first.baselines.items()}
    rows = [
        (dimension_name(first, number), *(None if math.isnan(one[number]) else one[number] for one in columns.values()))
        for number in range(len(first.names))
    ]
    return ResultTable(
        title="RMSE per dimension, in the data's units", columns=("dimension", *columns), rows=tuple(rows)
    )


def _over_steps(matrix: Any, errors: ActionErrors) -> list[float]:
    """The root mean square over steps, weighted by how many actions were compared."""
    squared = np.square(np.array(matrix, float).reshape(len(matrix), -1))
    counts = np.array(errors.counts, float)[:, None] * np.isfinite(squared)
    with np.errstate(invalid="ignore"):
        found: list[float] = np.sqrt(np.nansum(squared * counts, 0) / counts.sum(0)).tolist()
    return found


def _evaluations(runs: Sequence[RunRecord], names: Sequence[str]) -> list[Shown]:
    """What evaluators have left besides action errors, of the last evaluation of each."""
    room, shown = Room(), []
    for number, run in enumerate(runs):
        for evaluation in run.latest():
            one = _evaluation(evaluation, room)
            if any((one.tables, one.images, one.videos, one.texts, one.left_out)):
                one.anchor = f"evaluation-{number}-{one.anchor}"
                one.title = one.title if len(runs) == 1 else f"{names[number]}: {one.title}"
                shown.append(one)
    return shown


def _evaluation(evaluation: EvaluationFiles, room: Room) -> Shown:
    weights = ", averaged weights" if evaluation.ema else ""
    shown = Shown(
        f"{evaluation.evaluator}, step {evaluation.step}{weights}", f"{EMA * evaluation.ema}{evaluation.evaluator}"
    )
    for name, path in evaluation.files.items():
        kind = path.suffix.lower()
        try:
            if name.endswith(TABLE):
                shown.tables.append(read_table(path))
            elif name.endswith(ACTIONS):
                read_action_errors(path)
            elif kind in IMAGES:
                shown.images.append((name, _image(path, room)))
            elif kind in VIDEOS:
                shown.videos.append((name, _video(path, room)))
            elif kind in TEXTS:
                shown.texts.append((name, path.read_text(encoding="utf-8", errors="replace")[:LONGEST_TEXT]))
            elif name != "result.json":
                shown.left_out.append(f"{path}: not a kind of file that is shown")
        except (UserError, OSError, ValueError) as error:
            shown.left_out.append(f"{path}: {error}")
    return shown


def _first_batches(runs: Sequence[RunRecord], names: Sequence[str]) -> list[tuple[str, list[tuple[str, str]]]]:
    room, found = Room(), []
    for name, run in zip(names, runs, strict=True):
        images = []
        for path in run.first_batch:
            try:
                images.append((path.stem, _image(path, room)))
            except (OSError, ValueError):
                continue
        if images:
            found.append((name, images))
    return found


def _image(path: Path, room: Room) -> str:
    """The data URL of an image, as PNG in at most `WIDEST` columns."""
    from PIL import Image

    with Image.open(path) as opened:
        image = opened.convert("RGB")
    if image.width > WIDEST:
        image = image.resize((WIDEST, max(1, round(image.height * WIDEST / image.width))))
    out = io.BytesIO()
    image.save(out, "PNG", optimize=True)
    room.images -= len(out.getvalue())
    if room.images < 0:
        raise ValueError("the page has no room for more images")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def _video(path: Path, room: Room) -> str:
    """The data URL of a video."""
    size = path.stat().st_size
    if size > room.videos:
        raise ValueError(f"{size / 1e6:.1f} MB, for which the page has no room")
    room.videos -= size
    return f"data:{MIME[path.suffix.lower()]};base64," + base64.b64encode(path.read_bytes()).decode()
