"""Files that another machine writes to a shared file system: see them in spite of caches, or know they are missing.

A network file system shows new files late. An NFS client remembers for up to 60 seconds (`acdirmax`, nfs(5)) that a
name did not exist, and servers behind one address may differ for half a minute. So a look is repeated for up to
`PATIENCE` seconds, each time after reading the folder, which makes the client ask its server again. Names should be
new: no client can remember that they did not exist. Contents and sizes are compared, never times, because the clocks of
machines differ. A local file system hides nothing from the processes of its machine, so there the first look counts.
"""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

PATIENCE = 90.0
"""Seconds after which a file on a network file system is missing: NFS's 60, and half as much for its servers."""
PAUSES = (0.05, 2.0)
"""Seconds between two looks: at first, and at most."""
LOCAL = frozenset(
    {"bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "jfs", "overlay", "ramfs", "reiserfs", "rootfs", "tmpfs"}
    | {"vfat", "xfs", "zfs"}
)
"""File systems of one machine. All others may be shared and may show changes late."""


def name_process(rank: int) -> str:
    """A process of a run, for messages: `rank 3 on node1`."""
    return f"rank {rank} on {socket.gethostname()}"


def wait_until_seen(look: Callable[[], str], folder: Path, seconds: float | None = None) -> str:
    """Repeat a look at files that another process has written until nothing is wrong with them.

    Args:
        look: Returns what is wrong; empty: nothing.
        folder: Where the files are; it may not exist.
        seconds: For how long; None: what the file system of `folder` needs (`lag`).

    Returns:
        What was wrong at the last look; empty: nothing.
    """
    pause, begin = PAUSES[0], time.monotonic()
    while wrong := look():
        seconds = lag(folder) if seconds is None else seconds
        if time.monotonic() - begin >= seconds:
            break
        time.sleep(pause)
        pause = min(1.5 * pause, PAUSES[1])
        _read_folders(folder)
    return wrong


def has_text(path: Path, text: str) -> str:
    """What is wrong with a file that should have this content; empty: nothing."""
    try:
        with path.open("rb") as file:  # Opening, unlike stat, makes an NFS client ask for the current size.
            found = file.read(len(text.encode()) + 1)
    except OSError as error:
        return _in_words(error)
    return "" if found == text.encode() else "it has another content"


def has_sizes(folder: Path, sizes: Mapping[str, int]) -> str:
    """What is wrong with the first file of a folder that is missing or of another size; empty: nothing."""
    for name, size in sizes.items():
        try:
            with (folder / name).open("rb") as file:
                found = os.fstat(file.fileno()).st_size
        except OSError as error:
            return f"{name}: {_in_words(error)}"
        if found != size:
            return f"{name} has {found} bytes instead of {size}"
    return ""


def lag(path: Path, mounts: Path = Path("/proc/self/mountinfo")) -> float:
    """For how many seconds the file system of a path may hide a file that another machine has written; 0 if local."""
    there = next((one for one in (path, *path.absolute().parents) if os.path.lexists(one)), Path("/"))
    try:
        real = Path(os.path.realpath(there))
        lines = mounts.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return PATIENCE  # Not Linux: nothing is known.
    kind, longest = "", -1
    for line in lines:  # proc(5): "36 35 98:0 /root /mount/point options [optional] - type source options"
        mount, _, after = line.partition(" - ")
        point = Path(_unescaped(mount.split()[4]))
        if (real == point or point in real.parents) and len(point.parts) >= longest:  # A later mount covers it.
            kind, longest = after.split()[0], len(point.parts)
    return 0.0 if kind in LOCAL else PATIENCE


def _unescaped(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def _read_folders(folder: Path) -> None:
    """List a folder and those above it, up to the first that exists, so that an NFS client asks its server again."""
    for one in (folder, *folder.absolute().parents):
        with suppress(OSError):
            os.listdir(one)
            return


def _in_words(error: OSError) -> str:
    return "there is no such file" if isinstance(error, FileNotFoundError) else error.strerror or str(error)
