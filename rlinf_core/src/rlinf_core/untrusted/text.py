"""Read and print untrusted input safely. Plugins may use this module.

Datasets, weights, statistics and exported policies come from anywhere. Reading: JSON may be nested too deeply for
Python, and file names must not leave their folder. Printing: messages and tables quote names from such files, in which
an escape sequence could move the cursor, rename the window or hide a message; and a password in an address would end up
in logs. docs/security.md lists what is trusted and what is not.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from pathlib import Path, PurePosixPath
from typing import Any


class NotAFileError(OSError):
    """What should be a file is a folder, pipe, socket or device; the message says which, without naming it."""

    def __str__(self) -> str:
        return str(self.strerror)


def check_file(path: Path) -> None:
    """Require that a path is a file, after following links. Opening a pipe hangs, and a device may never end.

    Raises:
        NotAFileError: It is something else.
        OSError: It does not exist, or cannot be seen.
    """
    if what := not_a_file(path.stat()):
        raise NotAFileError(errno.EINVAL, f"it is {what}, not a file", str(path))


_KINDS = {stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket", stat.S_IFDIR: "a folder"}


def not_a_file(status: os.stat_result) -> str:
    """What something is instead of a file, in words; empty if it is one."""
    kind = stat.S_IFMT(status.st_mode)
    return "" if kind == stat.S_IFREG else _KINDS.get(kind, "a device")


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, without the byte order mark with which editors on Windows begin files.

    Raises:
        OSError: It cannot be read, or is not a file.
        ValueError: It is not UTF-8.
    """
    check_file(path)
    return path.read_text(encoding="utf-8-sig")


def parse_json(text: str | bytes) -> Any:
    """Parse a JSON document.

    Raises:
        ValueError: It is not JSON, or is nested too deeply for Python.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_json(path: Path) -> Any:
    """Parse a JSON file.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not JSON in UTF-8, or is nested too deeply for Python.
    """
    return parse_json(read_text(path))


def path_inside(folder: Path, name: object) -> Path:
    """The path of a file in a folder, by an untrusted relative name that must not leave the folder.

    Symbolic links are allowed: the hub's cache consists of them, and who can create one on this machine can read files
    without a dataset.

    Raises:
        ValueError: The name is not a string, or is empty, absolute or outside the folder.
    """
    if not isinstance(name, str) or "\0" in name or not name.strip("./"):
        raise ValueError(f"{name!r} is not a file name")
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{name!r} is outside the folder")
    return folder / name


_CONTROLS = re.compile(
    "["
    "\x00-\x08\x0b-\x1f\x7f-\x9f"  # Control characters except newline and tab; escape sequences start with one.
    "\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069"  # Changes of text direction, and other line separators.
    "\ud800-\udfff"  # Lone surrogates, which cannot be printed.
    "]"
)
_IN_ADDRESSES = re.compile(r"(?<=://)[^/\s@]*:[^/\s@]+(?=@)")
"""`user:password` before the host in an address."""
_TOKENS = re.compile(
    r"\b(?:(?:hf_|sk-|gh[oprsu]_|github_pat_|glpat-|npm_|dckr_pat_|AIza|wandb_v1_)[A-Za-z0-9_-]{20,}"
    r"|xox[abeprs]-[A-Za-z0-9-]{10,}"
    r"|(?:AKIA|ASIA)[A-Z0-9]{16}\b"
    r"|eyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,})"
)
"""Tokens by their form: Hugging Face, OpenAI, GitHub, GitLab, npm, Docker, Google, Weights & Biases, Slack, AWS, and
JSON Web Tokens."""
_IN_QUERIES = re.compile(
    r"(?i)(?<=[?&])((?:[\w.-]*(?:token|password|passwd|secret|signature|credential|api[_-]?key)|sig)=)[^&\s#'\"]+"
)
"""The value of a parameter of an address whose name says that it is a secret, such as `?token=`."""
_VARIABLES = re.compile(r"(?i)(?:^|_)(?:TOKEN|API_?KEY|SECRET|PASS|PASSWD|PASSWORD|SECRET_(?:ACCESS_)?KEY|ACCESS_KEY)$")
"""Names of environment variables and of keys that contain secrets, such as HF_TOKEN, WANDB_API_KEY and db_password."""
_OPAQUE = re.compile(r"(?=.*\d)[A-Za-z0-9_.+/=~-]{12,}")
"""What a token may look like; words of a vocabulary have brackets or blanks, no digits, or are short."""
SHORTEST = 8
"""Fewest characters of a secret in a variable; shorter values occur in ordinary words."""
HIDDEN = "***"


LONGEST_LINE, LONGEST_TEXT = 4_000, 100_000
"""Most characters of a line and of a text that are printed or shown: a task may have 30 million."""


def printable(text: str) -> str:
    r"""Text without secrets, with `\x1b` for an escape character, and shortened."""
    return shortened(without_controls(without_secrets(text)))


def shortened(text: str) -> str:
    """Text without the middle of very long lines, and of a very long text; says how much is left out."""
    if len(text) <= LONGEST_LINE:
        return text
    return _cut("\n".join(_cut(line, LONGEST_LINE) for line in text.split("\n")), LONGEST_TEXT)


def _cut(text: str, most: int) -> str:
    kept = (most - 100) // 2
    if len(text) <= most:
        return text
    return f"{text[:kept]} [... {len(text) - 2 * kept:,} characters are left out ...] {text[-kept:]}"


def without_controls(text: str) -> str:
    r"""Text with `\x1b` for an escape character, and likewise for other controls and changes of text direction."""
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def without_secrets(text: str) -> str:
    """Text with `***` for passwords in addresses, and for tokens of known forms or from the environment."""
    for secret in _in_environment():
        text = text.replace(secret, HIDDEN)
    text = _IN_QUERIES.sub(rf"\1{HIDDEN}", _IN_ADDRESSES.sub(HIDDEN, text))
    return _TOKENS.sub(HIDDEN, text)


def is_secret(key: str, value: str) -> bool:
    """Whether a key's name says that its value is a secret: `wandb_api_key`, `db-password`, `Token`.

    Words of a vocabulary, such as `eos_token = "<|im_end|>"`, are not secrets.
    """
    named = _VARIABLES.search(key.replace("-", "_"))
    if not named or not value.strip():
        return False
    return not named[0].lower().endswith("token") or _OPAQUE.fullmatch(value.strip()) is not None


def _in_environment() -> list[str]:
    found = {value.strip() for name, value in os.environ.items() if _VARIABLES.search(name)}
    return sorted((value for value in found if len(value) >= SHORTEST), key=len, reverse=True)
