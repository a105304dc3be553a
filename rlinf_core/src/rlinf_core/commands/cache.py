"""`rlinf cache`: decode the images of a run's datasets once, into files that need no decoding."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING

from rlinf_core.contract.datasets import LeRobotDatasetConfig
from rlinf_core.errors import Exit, UserError
from rlinf_core.terminal import print_phase, print_progress

if TYPE_CHECKING:
    from rlinf_core.contract.run import RunConfig, RunSource
    from rlinf_core.data.frame_cache.manifest import Cache, Caches
    from rlinf_core.data.frame_cache.parts import Conversion
    from rlinf_core.data.lerobot.source import LeRobotSource
    from rlinf_core.plugins.registry import Plugins

EPILOG = """\
A run uses the cache with data.cache = "raw" or "jpeg", the --format. Frames are stored at the policy's size if resizing
first gives exactly the same result, otherwise at the dataset's size. Raw frames are identical to the bit; the loss of
JPEG frames is printed. The command prints the space it needs before it starts, and stops if the disk has too little.

After an interruption, the same command continues where it stopped. On a complete cache it checks all hashes and repairs
damaged parts. Other episodes, another quality and changed dataset files get their own caches; existing ones stay. If a
cache has all the frames of this config and more, it is used and no other is written.

Exit codes: 0 if the cache is complete, else 2, or 130 on Ctrl-C.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.epilog = EPILOG
    parser.add_argument("config", help="the run's TOML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that override the file")
    parser.add_argument("--format", choices=("raw", "jpeg"), required=True, help="raw: largest, fastest, exact")
    parser.add_argument("--quality", type=int, metavar="N", help="JPEG quality, 1 to 100; default: data.cache_quality")
    parser.add_argument("--output", default="", metavar="DIR", help="folder of caches; default: data.cache_dir")
    parser.add_argument("--source", default="", metavar="NAME", help="one dataset of a mixture; default: all")
    cores = os.cpu_count() or 1
    parser.add_argument("--workers", type=int, default=cores, metavar="N", help="processes; default: one per core")


def run(options: argparse.Namespace) -> int:
    """Convert each dataset."""
    from rlinf_core.config.load import load_config
    from rlinf_core.plugins.registry import get_plugins

    if options.quality is not None and options.format != "jpeg":
        raise UserError(f"--quality is for JPEG: leave it out with --format {options.format}")
    if options.quality is not None and not 1 <= options.quality <= 100:
        raise UserError(f"--quality {options.quality} is not between 1 and 100")
    if options.workers < 1:
        raise UserError(f"--workers {options.workers}: must be at least 1")
    plugins = get_plugins()
    config = load_config(options.config, options.overrides, plugins)
    for source in (config.source(options.source),) if options.source else config.sources:
        with source.naming():
            _convert(options, config, source, plugins)
    return Exit.OK


def _convert(options: argparse.Namespace, config: RunConfig, source: RunSource, plugins: Plugins) -> None:
    from rlinf_core.data.frame_cache.manifest import caches_of
    from rlinf_core.data.frame_cache.parts import Conversion

    print_phase(f"reading the metadata of {source.run.data.repo_id}")
    splits = _open(source, plugins)
    data = source.run.data
    assert isinstance(data, LeRobotDatasetConfig)
    caches = caches_of(
        splits[0].metadata, data, config.policy, options.format, quality=options.quality or 0, above=options.output
    )
    print_phase("looking for these frames in existing caches")
    cache = _there_already(caches, splits)
    if cache is None:
        print_phase("decoding a few frames, to know the size of the cache")
        conversion = Conversion(caches, splits)
        _make(conversion, options.workers)
        cache = conversion.cache
    used = f'data.cache = "{options.format}"'
    used += f", data.cache_quality = {caches.quality}" if caches.quality else ""
    used += f', data.cache_dir = "{options.output}"' if options.output else ""
    print(f"{cache.folder}: complete; use it with {used}")


def _there_already(caches: Caches, splits: tuple[LeRobotSource, ...]) -> Cache | None:
    """A complete cache with these frames and more, with correct hashes; None if there is none."""
    from rlinf_core.data.frame_cache.manifest import find_cache, read_manifest
    from rlinf_core.data.frame_cache.writer import find_damaged

    cache, _ = find_cache(caches, splits, damaged=True)
    if cache is None:
        return None
    manifests = [read_manifest(cache.manifest(column)) for column in splits[0].images]
    early = any(manifest is not None and not manifest.evidence for manifest in manifests)
    others = len(cache.positions) > sum(len(split) for split in splits)
    if not others and not early:
        return None  # A cache of exactly these frames is repaired if damaged; one of an early version is only used.
    if damaged := find_damaged(cache, splits[0].images):
        raise UserError(
            f"{cache.folder} has these frames{' among others' * others}, but is damaged: {', '.join(damaged)}. Run "
            "`rlinf cache` with the config that wrote it, which repairs it, or remove the folder"
        )
    print(f"{cache.folder}\nall frames are there{', among others,' * others} and their hashes are right")
    return cache


def _make(conversion: Conversion, workers: int) -> None:
    """Write the missing parts, and print which ones."""
    from rlinf_core.data.frame_cache.writer import check_room, convert, find_missing, find_wrong, lock

    folder = conversion.cache.folder
    if not folder.is_dir():  # Without enough room, no empty folder is left behind.
        check_room(conversion, find_missing(conversion))
    with lock(folder):
        print_phase("checking the hashes of existing parts")
        missing = find_missing(conversion)
        needed, free = check_room(conversion, missing)
        print(_describe(conversion))
        if missing:
            done = f"{len(conversion.parts) - len(missing)} of {len(conversion.parts)} parts are complete"
            if wrong := find_wrong(conversion, missing):
                done += f"; damaged, written again: {', '.join(wrong)}"
            print(f"{needed / 1e9:.3g} GB to write, {free / 1e9:.3g} GB free; {done}")
        else:
            print("all parts are complete and their hashes are correct")
        sys.stdout.flush()
        with print_progress("converting", "parts") as progress:
            convert(conversion, missing, workers=workers, progress=progress)


def _open(source: RunSource, plugins: Plugins) -> tuple[LeRobotSource, ...]:
    """The splits that have rows, opened with the dataset's own images."""
    from rlinf_core.data.lerobot.source import LeRobotSource
    from rlinf_core.data.splits import open_splits

    data = source.run.data
    if not isinstance(data, LeRobotDatasetConfig) or not data.images:
        raise UserError(f"{data.config_name!r} has no images in LeRobot's layout: nothing to cache")
    without = data.model_copy(update={"cache": ""})
    decoded = source.run.model_copy(update={"data": without})
    splits = [split for split in open_splits(decoded, plugins) if split is not None]
    opened = tuple(split for split in splits if isinstance(split, LeRobotSource))
    if len(opened) < len(splits):
        raise UserError(f"{data.config_name!r} is read by another plugin: only core's LeRobot reader supports a cache")
    return opened


def _describe(conversion: Conversion) -> str:
    """What the cache will lock, in a few lines."""
    caches, cache, frames = conversion.caches, conversion.cache, len(conversion.positions)
    as_what = "as the policy resizes them" if caches.resize else "at the dataset's size"
    cameras = f"{len(conversion.columns)} camera{'s' * (len(conversion.columns) > 1)}"
    lines = [f"{cache.folder}", f"{frames} frames of {cameras}, {as_what}: {cache.format}"]
    for column, sampled in conversion.sampled.items():
        height, width = sampled.size
        each = sampled.raw_bytes if cache.format == "raw" else sampled.jpeg_bytes
        line = f"  {column}: {width} x {height}, {each / 1e3:.0f} kB per frame"
        if cache.format == "jpeg":
            line += f", off by {sampled.mean_loss:.2f} levels of 255 on average, {sampled.largest_loss} at most"
        lines.append(line)
    return "\n".join([*lines, f"{conversion.bytes_needed() / 1e9:.3g} GB in all"])
