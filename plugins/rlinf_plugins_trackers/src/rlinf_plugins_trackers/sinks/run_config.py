"""A run's config and environment, as trackers show and compare them."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from rlinf_core.untrusted.text import read_json


def run_config(folder: str) -> dict[str, Any]:
    """The complete config of the run in a folder; `environment` has versions, commit and device."""
    path = Path(folder)
    try:
        config = tomllib.loads((path / "config.toml").read_text(encoding="utf-8"))
        config["environment"] = read_json(path / "environment.json")
    except (OSError, ValueError):
        config = {}
    return config
