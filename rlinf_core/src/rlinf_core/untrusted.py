"""Reading what strangers wrote: JSON of any depth, and names of files that must stay in their folder.

Datasets, weights, statistics and exported policies come from anywhere. What they say is checked where it is read; this
is what all of these readers need. Plugins may use it; docs/security.md says what is trusted and what is not.
"""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import Any


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON document.

    Raises:
        ValueError: It is none, or is nested more deeply than Python follows.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_json(path: Path) -> Any:
    """The value of a JSON file.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is no JSON in UTF-8, or is nested more deeply than Python follows.
    """
    return parse_json(path.read_text(encoding="utf-8"))


def path_inside(folder: Path, name: object) -> Path:
    """The path of a file by the name that a document gives it, relative to a folder that it must not leave.

    Links are followed: the hub's cache consists of them, and whoever can make one here needs no dataset to read files.

    Raises:
        ValueError: The name is no text, empty, absolute or leads out of the folder.
    """
    if not isinstance(name, str) or "\0" in name or not name.strip("./"):
        raise ValueError(f"{name!r} is no name of a file")
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{name!r} leads out of the folder")
    return folder / name
