"""`rlinf cache`: decode the pictures of a run's datasets once, into files that are read without decoding."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING

from rlinf_core.commands.output import print_progress
from rlinf_core.errors import Exit, UserError

if TYPE_CHECKING:
    from rlinf_core.config.run import RunConfig, RunSource
    from rlinf_core.data.frame_cache_writing import Conversion
    from rlinf_core.plugins import Plugins

EPILOG = """\
A run uses the cache with data.cache = "raw" or "jpeg", the --format. Frames are kept as the policy resizes them where
that is exact, else at the dataset's size; raw ones are the frames to the bit, of JPEG the loss is told. What it needs
is said before the work, and refused if the disk has not got it.

Interrupted, the same command goes on where it was. On a complete cache it checks all hashes and mends what is wrong.

Exit codes: 0 if the cache is complete, else 2, or 130 on Ctrl-C.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.epilog = EPILOG
    parser.add_argument("config", help="the run's TOML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings over the file")
    parser.add_argument("--format", choices=("raw", "jpeg"), required=True, help="raw: largest, fastest, exact")
    parser.add_argument("--quality", type=int, default=95, metavar="N", help="of JPEG, 1 to 100; else 95")
    parser.add_argument("--output", default="", metavar="DIR", help="folder of caches; else data.cache_dir")
    parser.add_argument("--source", default="", metavar="NAME", help="one dataset of a mixture; else all")
    cores = os.cpu_count() or 1
    parser.add_argument("--workers", type=int, default=cores, metavar="N", help="processes; else one a core")


def run(options: argparse.Namespace) -> int:
    """Convert each dataset."""
    from rlinf_core.config.load import load_config
    from rlinf_core.plugins import get_plugins

    if not 1 <= options.quality <= 100:
        raise UserError(f"--quality {options.quality} is not from 1 to 100")
    plugins = get_plugins()
    config = load_config(options.config, options.overrides, plugins)
    for source in (config.source(options.source),) if options.source else config.sources:
        with source.naming():
            _convert(options, config, source, plugins)
    return Exit.OK


def _convert(options: argparse.Namespace, config: RunConfig, source: RunSource, plugins: Plugins) -> None:
    from rlinf_core.data.frame_cache_writing import check_room, convert, find_missing, hold

    conversion = _open(options, config, source, plugins)
    folder = conversion.place.folder
    with hold(folder):
        missing = find_missing(conversion)
        needed, free = check_room(conversion, missing)
        print(_describe(conversion))
        if missing:
            there = f"{len(conversion.parts) - len(missing)} of {len(conversion.parts)} parts are there"
            print(f"{needed / 1e9:.3g} GB to write, {free / 1e9:.3g} GB free; {there}")
        else:
            print("all parts are there and their hashes are right")
        sys.stdout.flush()
        with print_progress("converting") as progress:
            convert(conversion, missing, workers=options.workers, progress=progress)
    where = f'; data.cache_dir = "{options.output}"' if options.output else ""
    print(f'{folder}: complete; use it with data.cache = "{options.format}"{where}')


def _open(options: argparse.Namespace, config: RunConfig, source: RunSource, plugins: Plugins) -> Conversion:
    from rlinf_core.data.frame_cache import place_of
    from rlinf_core.data.frame_cache_writing import Conversion
    from rlinf_core.data.lerobot import LeRobotSource
    from rlinf_core.data.splits import open_split
    from rlinf_core.datasets import LeRobotDatasetConfig

    data = source.run.data
    if not isinstance(data, LeRobotDatasetConfig) or not data.images:
        raise UserError(f"{data.config_name!r} names no pictures of a dataset in LeRobot's layout: nothing to convert")
    decoded = source.run.model_copy(update={"data": data.model_copy(update={"cache": ""})})
    splits = [open_split(decoded, plugins, "train")]
    if data.has_validation:
        splits.append(open_split(decoded, plugins, "validation"))
    opened = tuple(split for split in splits if isinstance(split, LeRobotSource))
    if len(opened) < len(splits):
        raise UserError(
            f"{data.config_name!r} is read by another plugin: only core's reader of LeRobot data has a cache"
        )
    place = place_of(opened[0].metadata, data, config.policy, options.format, options.output)
    return Conversion(place, opened, options.quality)


def _describe(conversion: Conversion) -> str:
    """What will be there, in a few lines."""
    place, frames = conversion.place, len(conversion.positions)
    as_what = "as the policy resizes them" if place.resize else "at the dataset's size"
    lines = [f"{place.folder}", f"{frames} frames of {len(conversion.columns)} cameras, {as_what}: {place.format}"]
    for column, sampled in conversion.sampled.items():
        height, width = sampled.size
        each = sampled.raw_bytes if place.format == "raw" else sampled.jpeg_bytes
        line = f"  {column}: {width} x {height}, {each / 1e3:.0f} kB a frame"
        if place.format == "jpeg":
            line += f", off by {sampled.mean_loss:.2f} levels of 255 on average, {sampled.largest_loss} at most"
        lines.append(line)
    return "\n".join([*lines, f"{conversion.bytes_needed() / 1e9:.3g} GB in all"])
