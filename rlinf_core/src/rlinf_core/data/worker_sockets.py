"""Where worker processes meet the one that starts them: sockets, whose paths must be short.

Python puts them below the temporary folder, but a scheduler's `TMPDIR` is often longer than a socket's path may be.
"""

from __future__ import annotations

import os
import tempfile
from multiprocessing import util

from rlinf_core.errors import UserError

LONGEST = 103
"""Bytes of a socket's path on macOS, without the zero at its end; Linux allows 107."""
BELOW = len("/pymp-12345678/listener-12345678")
"""Bytes that Python adds to the temporary folder."""
SHORT_FOLDERS = ("/tmp", "/var/tmp")


def place_sockets(instead: str) -> None:
    """Let this process and its workers put their sockets into a short folder if `TMPDIR` is a long one.

    Python decides once, in the folder of its own that it makes here; only the user can open it. Files stay in `TMPDIR`.

    Args:
        instead: How to do without workers, for the message.

    Raises:
        UserError: `TMPDIR` is too long, and no short folder can be written to.
    """
    there = tempfile.gettempdir()
    if _fits(there):
        return
    short = [folder for folder in SHORT_FOLDERS if os.access(folder, os.W_OK | os.X_OK)]
    if short:
        before, tempfile.tempdir = tempfile.tempdir, short[0]
        try:
            made = util.get_temp_dir()
        finally:
            tempfile.tempdir = before
        if _fits(os.path.dirname(made)):  # Else other code has made it earlier, in the long folder.
            return
    raise UserError(
        f"TMPDIR ({there}) is too long for the sockets of worker processes: set it to a folder of at most "
        f"{LONGEST - BELOW} characters, or {instead}"
    )


def _fits(folder: str) -> bool:
    return len(os.fsencode(folder)) + BELOW <= LONGEST
