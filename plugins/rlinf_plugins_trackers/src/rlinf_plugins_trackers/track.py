"""`rlinf track`: log a run's folder to a tracker, or what the tracker lacks of it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rlinf_core import UserError
from rlinf_plugins_trackers.config import TRACKERS, TrackerConfig
from rlinf_plugins_trackers.memory import saved_settings

EPILOG = """\
A run whose tracker was stopped, or that had none: its steps, images, tables and videos are in its folder, and are
logged from there, each only once. Settings are those with which the run used the tracker before, unless they are given
here.
"""
EVERYTHING = 2**62
"""A step after all: nothing that was logged is repeated."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.epilog = EPILOG
    parser.add_argument("run", help="the run's folder, runs/<name>")
    parser.add_argument("tracker", choices=[*TRACKERS], help="the tracker")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="its settings: project=arms mode=offline")


def run(options: argparse.Namespace) -> None:
    """Log the run, and wait until the tracker has everything."""
    folder = Path(options.run)
    if not (folder / "metrics.jsonl").is_file():
        raise UserError(
            f"{folder} is not a run with metrics: it has no metrics.jsonl; name the run's folder, runs/<name>"
        )
    config = _config(options.tracker, folder, options.settings)
    logger = config.start(folder, folder.resolve().name, EVERYTHING)
    logger.close(None)
    print(f"{folder}: logged to {options.tracker}")


def _config(type: str, folder: Path, settings: list[str]) -> TrackerConfig:
    table: dict[str, Any] = saved_settings(folder, type)
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise UserError(f"{setting!r} is not key=value")
        table[key] = _value(value)
    try:
        return TRACKERS[type].model_validate(table)
    except ValidationError as error:
        mistakes = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
        raise UserError(f"settings of {type}: {mistakes}") from error


def _value(text: str) -> Any:
    """A value as JSON writes it, or a text."""
    try:
        return json.loads(text)
    except ValueError:
        return text
