"""FFmpeg for torchcodec without an FFmpeg on the system: the libraries that PyAV's wheel brings along.

torchcodec is linked to FFmpeg's shared libraries by their plain names (`libavcodec.so.61`). PyAV's wheels contain
these libraries, but under names of their own (`libavcodec-7ee0753d.so.61.19.101`), so that wheels do not get into each
other's way. The dynamic linker takes a library that is loaded already for every later request of its name (its
`SONAME`). So for each of them an empty library is loaded that has the plain name and needs PyAV's: from then on
torchcodec and PyAV share one FFmpeg, whatever order they are imported in, and no environment variable is touched.
Linux only; elsewhere, and with a PyAV that was built against the system's FFmpeg, nothing is done. Imports no torch.
"""

from __future__ import annotations

import ctypes
import functools
import platform
import re
import struct
import sys
import tempfile
from pathlib import Path

import av

MACHINES = {"x86_64": 62, "aarch64": 183}
"""Processor, as `platform.machine` names it -> its number in an ELF file."""
_BUNDLED = re.compile(r"(lib(?:av|sw|postproc)\w*)-[0-9a-f]{8}\.so\.(\d+)[.\d]*")
"""A library in the wheel: its name, and the major version that its plain name ends in."""


@functools.cache
def lend_ffmpeg() -> tuple[str, ...]:
    """Make PyAV's FFmpeg libraries known to this process by their plain names, once.

    Returns:
        These names; empty where PyAV has no libraries of its own.

    Raises:
        OSError: A library could not be loaded.
    """
    folder = Path(av.__file__).parents[1] / "av.libs"
    machine = MACHINES.get(platform.machine())
    if sys.platform != "linux" or machine is None or not folder.is_dir():
        return ()
    found = {f"{match[1]}.so.{match[2]}": path for path in folder.iterdir() if (match := _BUNDLED.fullmatch(path.name))}
    with tempfile.TemporaryDirectory(prefix="rlinf_ffmpeg_") as aliases:
        for name, path in sorted(found.items()):
            alias = Path(aliases) / name
            alias.write_bytes(alias_library(name, path.name, machine))
            ctypes.CDLL(str(alias))  # Never unloaded; its file is of no use from here on.
    return tuple(sorted(found))


def alias_library(name: str, needed: str, machine: int) -> bytes:
    """An ELF shared library without code: its `SONAME` is `name`, and it needs the library `needed`.

    Laid out as: file header, three program headers (the whole file is loaded; where the dynamic section is; no stack
    with code, which is what a file without this header would ask for), the dynamic section, a symbol table with nothing
    but the empty first symbol, the strings. 64 bits, little endian.
    """
    strings = b"\0" + name.encode() + b"\0" + needed.encode() + b"\0"
    dynamic_at = 64 + 3 * 56
    symbols_at = dynamic_at + 7 * 16
    strings_at = symbols_at + 24
    dynamic = {
        14: 1,  # DT_SONAME, where in the strings
        1: len(name) + 2,  # DT_NEEDED, likewise
        5: strings_at,  # DT_STRTAB
        10: len(strings),  # DT_STRSZ
        6: symbols_at,  # DT_SYMTAB
        11: 24,  # DT_SYMENT, bytes of a symbol
        0: 0,  # DT_NULL
    }
    size = strings_at + len(strings)
    shared_object, read_write = 3, 6
    header = b"\x7fELF\2\1\1" + bytes(9)
    header += struct.pack("<HHIQQQIHHHHHH", shared_object, machine, 1, 0, 64, 0, 0, 64, 56, 3, 0, 0, 0)
    load = struct.pack("<IIQQQQQQ", 1, read_write, 0, 0, 0, size, size, 0x10000)  # aligned for the largest pages
    section = struct.pack("<IIQQQQQQ", 2, read_write, dynamic_at, dynamic_at, dynamic_at, 7 * 16, 7 * 16, 8)
    stack = struct.pack("<IIQQQQQQ", 0x6474E551, read_write, 0, 0, 0, 0, 0, 16)
    entries = b"".join(struct.pack("<qQ", tag, value) for tag, value in dynamic.items())
    return header + load + section + stack + entries + bytes(24) + strings
