"""Text that may be shown and kept: without control over the terminal, and without secrets.

Datasets, weights and other people's files name things, and messages and tables repeat these names. An escape sequence
among them would move the cursor, colour or rename the window, or hide what is said; a password in an address would end
in logs. All that is printed for people passes here.
"""

from __future__ import annotations

import os
import re

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
