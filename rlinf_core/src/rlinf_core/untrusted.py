"""What others wrote: reading it without harm, and printing it without harm.

Datasets, weights, statistics and exported policies come from anywhere. Reading: JSON of any depth, and file names that
must stay in their folder. Printing: messages and tables repeat the names found there, so an escape sequence among them
would move the cursor, rename the window or hide a message, and a password in an address would end up in logs. Plugins
may use this module; docs/security.md lists what is trusted and what is not.
"""

from __future__ import annotations

import json
import os
import re
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


_CONTROLS = re.compile(
    "["
    "\x00-\x08\x0b-\x1f\x7f-\x9f"  # Control characters but line end and tabulator: escape sequences begin with one.
    "\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069"  # What turns the direction of text, and other line ends.
    "\ud800-\udfff"  # Halves of surrogate pairs, which cannot be printed at all.
    "]"
)
_IN_ADDRESSES = re.compile(r"(?<=://)[^/\s@]*:[^/\s@]+(?=@)")
"""`user:password` before the host."""
_TOKENS = re.compile(r"\b(?:hf_|sk-|ghp_|github_pat_)[A-Za-z0-9_-]{20,}")
_VARIABLES = re.compile(r"(?:^|_)(?:TOKEN|API_KEY|SECRET|PASSWORD|SECRET_ACCESS_KEY)$")
"""Names of variables of the environment that hold secrets: HF_TOKEN, WANDB_API_KEY."""
SHORTEST = 8
"""Characters of a variable's value that is taken for a secret; shorter ones are parts of ordinary words."""
HIDDEN = "***"


def printable(text: str) -> str:
    r"""Text without secrets, and with `\x1b` for an escape character."""
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), without_secrets(text))


def without_secrets(text: str) -> str:
    """Text with `***` for passwords in addresses, and for tokens: those of known forms and of the environment."""
    for secret in _in_environment():
        text = text.replace(secret, HIDDEN)
    return _TOKENS.sub(HIDDEN, _IN_ADDRESSES.sub(HIDDEN, text))


def _in_environment() -> list[str]:
    found = {value.strip() for name, value in os.environ.items() if _VARIABLES.search(name)}
    return sorted((value for value in found if len(value) >= SHORTEST), key=len, reverse=True)
