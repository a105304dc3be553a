"""`rlinf norm-stats`: compute, diagnose, show, compare and import normalisation statistics."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from rlinf_core.commands.output import print_json, print_table, print_text
from rlinf_core.errors import Exit, UserError
from rlinf_core.files import check_writable, writing

if TYPE_CHECKING:
    from rlinf_core.contract.run import RunConfig
    from rlinf_core.data.normalize import NormStats
    from rlinf_core.data.statistics.run import Diagnosis

STATISTICS = ("mean", "std", "q01", "q99")
SHOWN_DIFFERENCES = 20
NAME_STATISTICS = "Name a norm_stats.json"
NAME_OUTPUT = "Name another file with --output"

EPILOG = """\
With a config: the statistics that its run would start with, computed or from data.norm_stats, and their diagnosis.

--json prints an object: "made_of" (provenance of the statistics), "statistics" ("state" and "actions", each with
lists "mean", "std", "q01", "q99"; with a config also "min", "max", "share_beyond_5", "largest_normalized" and
"worst_episode"), with a config "normalization" and "findings" ([{"id", "severity", "key", "dimensions", "message",
"way_out"}]); with --diff a list of {"key", "dimension", "statistic", "a", "b", "spreads"}.
Exit codes: 0, or 2 if a finding is an error.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.epilog = EPILOG
    parser.add_argument("config", nargs="?", help="a run's TOML file")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings that override the file: data.norm_floor=0.01"
    )
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--show", metavar="FILE", help="show a norm_stats.json")
    instead.add_argument("--diff", nargs=2, metavar=("A", "B"), help="compare two files, in units of A's spread")
    instead.add_argument(
        "--import", dest="imported", metavar="FILE", help="import another project's file (--from); needs --output"
    )
    parser.add_argument(
        "--from",
        dest="project",
        choices=("openpi", "lerobot"),
        help="project of the file: openpi's norm_stats.json; lerobot's meta/stats.json or a policy's normalizer "
        ".safetensors, for the columns that a config names, by default observation.state and action",
    )
    parser.add_argument("--source", default="", metavar="NAME", help="which dataset of a mixture")
    parser.add_argument("--output", metavar="FILE", help="the norm_stats.json to write")
    parser.add_argument("--json", action="store_true", help="print everything as one JSON document")


def run(options: argparse.Namespace) -> int:
    """Compute, show, compare or import."""
    if bool(options.imported) != bool(options.project):
        raise UserError("--import FILE and --from openpi|lerobot go together")
    if options.output:
        check_writable(Path(options.output), NAME_OUTPUT, file=True)
    if options.imported:
        _import(options)
    elif options.diff:
        _diff(*map(Path, options.diff), as_json=options.json)
    elif options.show:
        _show(Path(options.show), as_json=options.json)
    elif not options.config:
        raise UserError("give a config, or one of --show FILE, --diff A B, --import FILE --from openpi|lerobot")
    else:
        return _compute(options)
    return Exit.OK


def _load(options: argparse.Namespace) -> RunConfig:
    from rlinf_core.config.load import load_config
    from rlinf_core.plugins.registry import get_plugins

    return load_config(options.config, options.overrides, get_plugins()).source(options.source).run


def _compute(options: argparse.Namespace) -> int:
    from rlinf_core.data.normalize import save_norm_stats
    from rlinf_core.data.splits import open_split
    from rlinf_core.data.statistics.run import diagnose
    from rlinf_core.plugins.registry import get_plugins
    from rlinf_core.terminal import print_phase

    print_phase("loading plugins, the config and the data")
    run = _load(options)
    rows = open_split(run, get_plugins(), "train", images=False)
    print_phase(f"statistics of {len(rows)} training rows")
    diagnosis = diagnose(run, rows)
    errors = any(finding.severity == "error" for finding in diagnosis.findings)
    tables = _diagnosed(diagnosis)
    names = {key: one.names for key, one in diagnosis.distributions.items()}
    if options.json:
        # Dimensions are numbers here; their names are for people.
        findings = [
            {key: value for key, value in asdict(finding).items() if key != "names"} for finding in diagnosis.findings
        ]
        print_json(_document(asdict(diagnosis.origin), tables, normalization=diagnosis.mode, findings=findings))
    else:
        _print(tables, names)
        for finding in diagnosis.findings:
            print_text(f"{finding.severity}: {finding}")
    if options.output and not errors:
        with writing(Path(options.output), NAME_OUTPUT):
            save_norm_stats(Path(options.output), diagnosis.stats, diagnosis.origin)
        _say(f"{options.output}: written", options)
    return Exit.USER_ERROR if errors else Exit.OK


def _diagnosed(diagnosis: Diagnosis) -> dict[str, dict[str, list[Any]]]:
    """Statistics, and extremes of the data normalised by them, as lists by name."""
    from rlinf_core.data.statistics.diagnose import normalized_extremes, share_beyond

    broken = {finding.key for finding in diagnosis.findings if finding.severity == "error"}
    tables = {key: _lists(stats) for key, stats in diagnosis.stats.items()}
    for key, data in diagnosis.distributions.items():
        if key not in tables or key in broken:
            continue
        extremes = normalized_extremes(key, diagnosis.stats, data, diagnosis.mode)
        tables[key] |= {
            "min": data.running.low.tolist(),
            "max": data.running.high.tolist(),
            "share_beyond_5": share_beyond(key, diagnosis.stats, data, diagnosis.mode).tolist(),
            "largest_normalized": extremes.max(axis=0).tolist(),
            "worst_episode": data.episodes[extremes.argmax(axis=0)].tolist(),
        }
    return tables


def _show(path: Path, *, as_json: bool) -> None:
    from rlinf_core.data.normalize import load_with_origin

    stats, origin = load_with_origin(path, NAME_STATISTICS)
    tables = {key: _lists(value) for key, value in stats.items()}
    if as_json:
        print_json(_document(asdict(origin), tables))
        return
    _print(tables)
    for name, value in asdict(origin).items():
        if value:
            print_text(f"{name.replace('_', ' ')}: {value}")


def _diff(a: Path, b: Path, *, as_json: bool) -> None:
    from rlinf_core.data.normalize import load_norm_stats

    both = load_norm_stats(a, NAME_STATISTICS), load_norm_stats(b, NAME_STATISTICS)
    if both[0].keys() != both[1].keys():
        raise UserError(f"{a} has {', '.join(both[0])}, {b} has {', '.join(both[1])}")
    rows = [row for key in both[0] for row in _differences(key, both[0][key], both[1][key])]
    rows.sort(key=lambda row: -abs(row["spreads"] or 0.0))
    if as_json:
        print_json(rows)
        return
    columns = ["key", "dimension", "statistic", "a", "b", "spreads"]
    print_table(columns, [[_text(row[column]) for column in columns] for row in rows[:SHOWN_DIFFERENCES]])
    if not rows:
        print_text("no difference")
    elif len(rows) > SHOWN_DIFFERENCES:
        print_text(f"and {len(rows) - SHOWN_DIFFERENCES} smaller ones")
    for key in both[0]:
        widths = len(both[0][key].mean), len(both[1][key].mean)
        if widths[0] != widths[1]:
            print_text(f"{key}: A has {widths[0]} dimensions, B {widths[1]}; only those of both are compared")


def _differences(key: str, a: NormStats, b: NormStats) -> list[dict[str, Any]]:
    """Every statistic that differs, in units of A's standard deviation; None if one file lacks it."""
    from rlinf_core.data.normalize import EPSILON

    rows = []
    for dimension in range(min(len(a.mean), len(b.mean))):
        for name in STATISTICS:
            x, y = (float(getattr(stats, name)[dimension]) for stats in (a, b))
            if x != y and not (x != x and y != y):  # NaN in both: a quantile that neither file has.
                spreads = (y - x) / (float(a.std[dimension]) + EPSILON) if x == x and y == y else None
                row = {"key": key, "dimension": dimension, "statistic": name, "a": _known(x), "b": _known(y)}
                rows.append(row | {"spreads": spreads})
    return rows


def _import(options: argparse.Namespace) -> None:
    from rlinf_core.data.normalize import Origin, save_norm_stats
    from rlinf_core.data.statistics.importers import LEROBOT_COLUMNS, read_lerobot, read_openpi

    if not options.output:
        raise UserError("--import needs --output FILE, the norm_stats.json to write")
    path = Path(options.imported)
    columns: Mapping[str, Any] = LEROBOT_COLUMNS
    if options.config:
        columns = _columns(_load(options), options.project)
    stats = read_openpi(path) if options.project == "openpi" else read_lerobot(path, columns)
    with writing(Path(options.output), NAME_OUTPUT):
        save_norm_stats(Path(options.output), stats, Origin(dataset=f"{options.project}: {path}"))
    if any(value != value for one in stats.values() for value in one.q01):
        _say(f"{path} has no quantiles: use the statistics only for policies that normalise by mean_std", options)
    elif options.project == "lerobot" and path.suffix == ".json":
        _say("lerobot's quantiles are means of the episodes' quantiles, narrower than those of all frames", options)
    tables = {key: _lists(value) for key, value in stats.items()}
    if options.json:
        print_json(_document(asdict(Origin(dataset=f"{options.project}: {path}")), tables))
    else:
        _print(tables)
        print_text(f"{options.output}: written")


def _columns(run: RunConfig, project: str) -> dict[str, Any]:
    """The config's columns, if lerobot's statistics of these columns are those of what the policy sees."""
    from rlinf_core.contract.datasets import LeRobotDatasetConfig
    from rlinf_core.data.transforms import RelativeActions

    if project != "lerobot" or not isinstance(run.data, LeRobotDatasetConfig):
        raise UserError("a config is only needed to select columns of lerobot's file: leave it out")
    if any(isinstance(transform, RelativeActions) for transform in run.data.transforms()):
        raise UserError(
            "the config trains on actions relative to the state, but lerobot's statistics are of the recorded actions: "
            "leave data.norm_stats empty to compute them"
        )
    return {"state": run.data.state, "actions": run.data.actions}


def _say(text: str, options: argparse.Namespace) -> None:
    """Print a line, unless --json is given."""
    if not options.json:
        print_text(text)


def _document(provenance: dict[str, Any], tables: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    known = {name: value for name, value in provenance.items() if value}
    return {"made_of": known, "statistics": tables} | more


def _lists(stats: NormStats) -> dict[str, list[Any]]:
    return {name: [_known(value) for value in getattr(stats, name).tolist()] for name in STATISTICS}


def _known(value: float) -> float | None:
    """None for NaN, which marks a quantile that a file lacks and which JSON cannot represent."""
    return value if value == value else None


def _print(
    tables: Mapping[str, dict[str, list[Any]]], dimension_names: Mapping[str, Sequence[str]] = MappingProxyType({})
) -> None:
    names = list(dict.fromkeys(name for table in tables.values() for name in table))
    rows = []
    for key, table in tables.items():
        for dimension in range(len(table["mean"])):
            cells = [table[name][dimension] if dimension < len(table.get(name, ())) else None for name in names]
            name = dict(enumerate(dimension_names.get(key, ()))).get(dimension, "")
            rows.append([f"{key}[{dimension}{': ' * bool(name)}{name}]", *map(_text, cells)])
    print_table(["", *(name.replace("_", " ") for name in names)], rows)


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
