"""`rlinf check-dataset`: check the files of a LeRobot dataset."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlinf_core.commands.output import print_json, print_text
from rlinf_core.errors import Exit, UserError
from rlinf_core.terminal import print_phase, print_progress

if TYPE_CHECKING:
    from rlinf_core.contract.datasets import LeRobotDatasetConfig
    from rlinf_core.data.check.files import Depth
    from rlinf_core.data.check.findings import Damage
    from rlinf_core.data.lerobot.metadata import Metadata

JSON_KEYS = """\
Checks the metadata and all numbers, that every image exists, and that the first and last frame of every episode can be
decoded. --fast skips the images, --full decodes all of them. For a dataset on the hub, the files to check are
downloaded. docs/lerobot.md explains each kind of finding.

--json prints an object: "ok", "dataset", "format", "episodes", "frames", "checked" ("fast", "ends" or "full"), "counts"
(findings by kind) and "findings", a list of {"kind", "note", "file", "episode", "frame", "message"}, at most 20 per
kind, most severe first; a note is not damage. Exit codes: 0 if ok, otherwise 2.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.epilog = JSON_KEYS
    parser.add_argument(
        "dataset", help="a folder, owner/name[@revision] on the hub, or a run's TOML file, to check the columns it uses"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that override the TOML file")
    parser.add_argument("--source", default="", metavar="NAME", help="which dataset of a mixture in the TOML file")
    depth = parser.add_mutually_exclusive_group()
    depth.add_argument("--fast", action="store_true", help="metadata and numbers only")
    depth.add_argument("--full", action="store_true", help="decode every frame")
    parser.add_argument(
        "--repair", default="", metavar="FOLDER", help="write a copy there whose metadata agree with the files"
    )
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")


def run(options: argparse.Namespace) -> int:
    """Check, and print the report."""
    if options.repair:
        return _repair(options)
    depth: Depth = "fast" if options.fast else "full" if options.full else "ends"
    try:
        report, damage = _check(options.dataset, _config(options), depth)
    except UserError as error:
        if not options.json:
            raise
        finding = {"kind": "metadata", "note": False, "file": "", "episode": None, "frame": None, "message": str(error)}
        known = {"ok": False, "dataset": options.dataset, "checked": depth}
        print_json(known | {"counts": {"metadata": 1}, "findings": [finding]})
        return Exit.USER_ERROR
    if options.json:
        found = [finding.to_json() for kind in damage.by_kind().values() for finding in kind]
        print_json(report | {"counts": {kind: damage.counts[kind] for kind in damage.by_kind()}, "findings": found})
    else:
        _print(report, damage)
    return Exit.OK if damage.ok else Exit.USER_ERROR


def _repair(options: argparse.Namespace) -> int:
    from rlinf_core.data.check.repair import repair
    from rlinf_core.data.lerobot.files import find_dataset
    from rlinf_core.data.lerobot.metadata import read_metadata

    if options.json or options.full or options.fast:
        raise UserError("--repair writes a copy and checks nothing: leave --json, --full and --fast out")
    config = _config(options)
    name = config.repo_id if config else options.dataset
    place = find_dataset(name, config.revision if config else "", setting="data.repo_id" if config else "dataset")
    if place.snapshot:
        raise UserError(
            f"--repair needs the whole dataset in a folder: hf download {name} --repo-type dataset --local-dir FOLDER"
        )
    changes = repair(read_metadata(name, place.root), Path(options.repair))
    print_text("\n".join(changes) if changes else "nothing to correct: the metadata agree with the files")
    if changes:
        print_text(f"{options.repair}: written; its data and videos are links to {place.root}")
    return Exit.OK


def _config(options: argparse.Namespace) -> LeRobotDatasetConfig | None:
    """The `[data]` table of a TOML file; None if the argument is a dataset."""
    if not options.dataset.endswith(".toml"):
        if options.overrides or options.source:
            which = options.overrides[0] if options.overrides else "--source"
            raise UserError(f"{which!r}: settings apply to a run's TOML file, not to a dataset")
        if Path(options.dataset).is_file():
            raise UserError(
                f"{options.dataset} is a file, but neither a dataset's folder nor a run's TOML file: give one of "
                "these, or the id of a dataset on the hub, owner/name"
            )
        return None
    from rlinf_core.config.load import load_config
    from rlinf_core.contract.datasets import LeRobotDatasetConfig
    from rlinf_core.plugins.registry import get_plugins

    run = load_config(options.dataset, options.overrides, get_plugins())
    data = run.source(options.source).run.data
    if not isinstance(data, LeRobotDatasetConfig):
        raise UserError(
            f"{options.dataset}: {data.config_name!r} does not use LeRobot's layout, the only one that can be checked"
        )
    return data


def _check(name: str, config: LeRobotDatasetConfig | None, depth: Depth) -> tuple[dict[str, Any], Damage]:
    from rlinf_core.data.check.files import check_files, number_columns
    from rlinf_core.data.check.pictures import Reading
    from rlinf_core.data.lerobot.checks import check_columns
    from rlinf_core.data.lerobot.episodes import chosen_by_number
    from rlinf_core.data.lerobot.files import find_dataset
    from rlinf_core.data.lerobot.metadata import read_metadata

    name = config.repo_id if config else name
    print_phase(f"reading the metadata of {name}")
    place = find_dataset(name, config.revision) if config else find_dataset(name, setting="dataset")
    metadata = read_metadata(name, place.root)
    if config:
        check_columns(config, metadata)
        cameras, vectors = list(dict.fromkeys(config.images.values())), [*config.state, *config.actions]
        reads = Reading(None if config.decoder == "auto" else config.decoder, train=True)
    else:
        cameras = [*metadata.columns_of("image"), *metadata.columns_of("video")]
        vectors, reads = number_columns(metadata), Reading()
    chosen = chosen_by_number(config, metadata.episodes, metadata.lengths) if config else None
    used = metadata if chosen is None else metadata.only(chosen)
    if place.snapshot:
        print_phase(f"downloading what is missing of {name}")
    place.fetch(used.files(() if depth == "fast" else cameras))
    if not place.snapshot:
        metadata = metadata.with_videos_found()
    if depth == "fast" and place.snapshot:
        cameras = []  # Their files are not downloaded.
    decoded = {"fast": "", "ends": ", and the first and last frame of each episode", "full": ", and every frame"}[depth]
    print_phase(f"checking {len(used.episodes)} episodes: all numbers{decoded if cameras else ''}")
    with print_progress("checking", "files") as progress:
        damage = check_files(
            metadata,
            cameras=cameras,
            vectors=vectors,
            depth=depth,
            local=not place.snapshot,
            chosen=chosen,
            match=config.match_frames if config else "time",
            reads=reads,
            progress=progress,
        )
    return _facts(used, name, depth) | {"ok": damage.ok}, damage


def _facts(metadata: Metadata, name: str, depth: Depth) -> dict[str, Any]:
    episodes, frames = len(metadata.episodes), int(metadata.lengths.sum())
    facts = {"ok": False, "dataset": name, "format": metadata.version, "episodes": episodes, "frames": frames}
    return facts | {"checked": depth}


def _print(report: dict[str, Any], damage: Damage) -> None:
    from rlinf_core.data.check.findings import NOTES

    head = f"{report['dataset']} ({report['format']}, {report['episodes']} episodes, {report['frames']} frames)"
    damages = sum(count for kind, count in damage.counts.items() if kind not in NOTES)
    print_text(f"{head}: {'ok' if damage.ok else f'{damages} findings' if damages > 1 else '1 finding'}")
    for kind, findings in damage.by_kind().items():
        print_text(f"{kind} ({damage.counts[kind]}{', note' * (kind in NOTES)})")
        for finding in findings:
            print_text(f"  {finding}")
        if more := damage.counts[kind] - len(findings):
            print_text(f"  and {more} more")
