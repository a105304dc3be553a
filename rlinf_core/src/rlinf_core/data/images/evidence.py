"""Evidence that an image file is still the same, without reading all of it: its size and a digest of a few parts.

Times are no evidence: `git clone`, a download and `rsync` without `-t` set others on the same files. The beginning and
the end of a video contain its index, and the end of a parquet file its footer: both list the sizes of what is between.
A few changed bytes in between are not found.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rlinf_core.untrusted import check_file

HEAD, MIDDLE, TAIL = 2**12, 2**12, 2**14
"""Bytes that are read at the beginning, in the middle and at the end."""
READERS = 8
"""Files that are read in parallel: network file systems answer late."""


def evidence_of(path: Path) -> str:
    """Size and digest of a file, or why it cannot be read: 0.05 ms on a local disk."""
    try:
        check_file(path)
        with path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            digest = hashlib.blake2b(digest_size=8)
            for start, count in ((0, HEAD), (size // 2, MIDDLE), (max(size - TAIL, 0), TAIL)):
                file.seek(start)
                digest.update(file.read(count))
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return f"{size} bytes, {digest.hexdigest()}"


def evidence_of_files(files: Mapping[str, Path]) -> dict[str, str]:
    """`evidence_of` some files, by name."""
    with ThreadPoolExecutor(READERS) as pool:
        return dict(zip(files, pool.map(evidence_of, files.values()), strict=True))


def differing(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """The files whose evidence differs, each with how: `front.mp4 (1200 bytes instead of 1100)`."""
    found = []
    for name in sorted({**before, **now}):
        if name not in now:
            found.append(f"{name} (not used any more)")
        elif name not in before:
            found.append(f"{name} (new)")
        elif before[name] != now[name]:
            was, is_ = before[name].split(",")[0], now[name].split(",")[0]
            how = f"{is_} instead of {was}" if was != is_ else "other content of the same size"
            found.append(f"{name} ({how})")
    return found
