"""Read parquet files that come from anywhere, in bounded memory. Plugins may use this module.

A parquet file of a few kilobytes can claim terabytes: a value that is repeated takes no space. So before anything is
decoded, the footer is added up: what the wanted columns claim may take `FREE` bytes in memory plus `RATIO` times the
size of the file. Columns of texts and images are read in batches, because a dictionary holds a long text once for many
rows, and the footer does not say how often. Recorded data takes less than 100 times the size of its file.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rlinf_core.errors import UserError
from rlinf_core.untrusted.text import check_file

FREE = 2**26
"""Bytes in memory that any file may take."""
RATIO = 1000
"""Bytes in memory per byte of a file, above `FREE`."""
BATCH_RATIO = 100
"""The same for a batch of rows."""
_BYTES = {"BOOLEAN": 1, "INT32": 4, "INT64": 8, "INT96": 12, "FLOAT": 4, "DOUBLE": 8, "BYTE_ARRAY": 4}
"""Bytes of a value in memory; of a text or an image, those of its offset."""


@contextmanager
def open_parquet(path: Path) -> Iterator[pq.ParquetFile]:
    """Open a parquet file and read its footer.

    Raises:
        OSError: It is missing, or not a file but a pipe or a device, which would never end.
        pyarrow.ArrowException: It is damaged.
    """
    check_file(path)
    with pq.ParquetFile(path) as file:
        yield file


def read_table(file: pq.ParquetFile, path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Read columns of a file.

    Args:
        file: From `open_parquet`.
        path: Its path.
        columns: Which columns; None: all.

    Raises:
        UserError: They take too much memory.
        OSError: The file cannot be read.
        pyarrow.ArrowException: It is damaged.
    """
    claims = check_claims(file, path, columns)
    limit = _limit(path)
    if claims.repeated <= limit:
        return file.read(columns=None if columns is None else list(columns), use_threads=False)
    found, taken = [], 0
    for batch in read_batches(file, path, columns):
        taken += batch.nbytes
        if taken > limit:
            raise _too_large(path, f"more than {limit / 1e9:.2g} GB")
        found.append(batch)
    if not found:
        return file.read(columns=None if columns is None else list(columns), use_threads=False)
    metadata = file.schema_arrow.metadata
    return pa.Table.from_batches(found).replace_schema_metadata(metadata)


def read_batches(
    file: pq.ParquetFile, path: Path, columns: Sequence[str] | None = None, rows: int = 2**16
) -> Iterator[pa.RecordBatch]:
    """Read columns of a file in batches of at most `rows` rows, of fewer if its texts or images are large.

    Raises:
        UserError: They take too much memory.
        OSError: The file cannot be read.
        pyarrow.ArrowException: It is damaged.
    """
    claims = check_claims(file, path, columns)
    at_once = (FREE + BATCH_RATIO * path.stat().st_size) // max(claims.longest, 1)
    yield from file.iter_batches(
        batch_size=min(rows, max(at_once, 1)), columns=None if columns is None else list(columns), use_threads=False
    )


@dataclass(frozen=True)
class Claims:
    """What columns take in memory according to the file's footer."""

    bytes: int
    """All values, if no text or image is repeated."""
    repeated: int
    """The most bytes that texts and images take, if each is the longest."""
    longest: int
    """The most bytes that one text or image takes."""


def check_claims(file: pq.ParquetFile, path: Path, columns: Sequence[str] | None = None) -> Claims:
    """Raise `UserError` if columns take too much memory according to the file's footer; returns what they take."""
    claimed = repeated = longest = 0
    wanted = _leaves(file, columns)
    for rows, parts in _row_groups(path, len(file.schema)):
        for number, kind, width in wanted:
            values, size = parts[number]
            if min(size, values, rows) < 0:
                raise UserError(f"{path} is damaged: its footer counts less than nothing. Download or write it again")
            claimed += max(values, rows) * width
            if kind == "BYTE_ARRAY":
                claimed, repeated, longest = claimed + size, repeated + values * size, max(longest, size)
    if claimed > _limit(path):
        raise _too_large(path, f"{claimed / 1e9:.3g} GB")
    return Claims(claimed, repeated, longest)


def _leaves(file: pq.ParquetFile, columns: Sequence[str] | None) -> list[tuple[int, str, int]]:
    """Number, physical type and bytes of a value of the leaves of some columns, such as `action.list.element`."""
    names, inside = frozenset(columns or ()), tuple(f"{name}." for name in columns or ())
    found = []
    for number in range(len(file.schema)):
        leaf = file.schema.column(number)
        if columns is None or leaf.path in names or leaf.path.startswith(inside):
            kind = leaf.physical_type
            found.append((number, kind, leaf.length if kind == "FIXED_LEN_BYTE_ARRAY" else _BYTES[kind]))
    return found


def _row_groups(path: Path, leaves: int) -> Iterator[tuple[int, list[tuple[int, int]]]]:
    """Rows of each row group, and for each leaf the number of values and the uncompressed size.

    Read from the footer's bytes, because pyarrow's accessors end the process where C++ throws: at a damaged footer that
    calls a column encrypted, or that has other columns than the schema. Field numbers are those of `parquet.thrift`.
    """
    try:
        with path.open("rb") as file:
            file.seek(-8, os.SEEK_END)
            length = int.from_bytes(file.read(4), "little")
            file.seek(-8 - length, os.SEEK_END)
            groups = _Thrift(file.read(length)).struct()[4]
        for group in groups:
            parts = [(chunk[3][5], chunk[3][6]) for chunk in group[1]]
            if len(parts) != leaves or any(8 in chunk for chunk in group[1]):
                raise ValueError("it has other columns than the schema, or encrypted ones")
            yield group[3], parts
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path} cannot be read: its footer is damaged ({error}). Download or write it again"
        ) from error


class _Thrift:
    """Thrift's compact protocol: structs become dicts of field number -> value."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def struct(self) -> dict[int, Any]:
        """The struct at the current place."""
        fields: dict[int, Any] = {}
        number = 0
        data = self._data
        while head := data[self._at]:
            self._at += 1
            number = number + (head >> 4) if head >> 4 else self._number()
            kind = head & 15
            fields[number] = kind == 1 if kind < 3 else self._value(kind)
        self._at += 1
        return fields

    def _value(self, kind: int) -> Any:
        if 4 <= kind <= 6:
            return self._number()
        if kind == 8:
            return self._skip(self._varint())
        if kind == 12:
            return self.struct()
        if kind in (9, 10):
            head = self._byte()
            count = self._varint() if head >> 4 == 15 else head >> 4
            return [self._value(head & 15) for _ in range(count)]
        if kind in (1, 2, 3):
            return self._byte()
        if kind == 7:
            return self._skip(8)
        if kind == 11:
            count = self._varint()
            kinds = self._byte() if count else 0
            return [(self._value(kinds >> 4), self._value(kinds & 15)) for _ in range(count)]
        raise ValueError(f"it has a value of the unknown kind {kind}")

    def _byte(self) -> int:
        byte = self._data[self._at]
        self._at += 1
        return byte

    def _varint(self) -> int:
        data, at = self._data, self._at
        byte = found = data[at]
        shift = 0
        while byte > 127:
            at, shift = at + 1, shift + 7
            if shift > 63:
                raise ValueError("it has a number of more than 64 bits")
            byte = data[at]
            found = found & ~(128 << shift - 7) | byte << shift
        self._at = at + 1
        return found

    def _number(self) -> int:
        found = self._varint()
        return found >> 1 ^ -(found & 1)

    def _skip(self, count: int) -> None:
        if count > len(self._data) - self._at:
            raise ValueError("it ends in a text")
        self._at += count


def _too_large(path: Path, how_much: str) -> UserError:
    size = path.stat().st_size
    return UserError(
        f"{path} has {size / 1e3:.3g} kB, but its columns take {how_much} in memory; at most "
        f"{_limit(path) / 1e9:.2g} GB are accepted from a file of this size. It is damaged, or made to exhaust memory: "
        "download or write it again. If it is yours, split it into several files, or write it without compression"
    )


def _limit(path: Path) -> int:
    return FREE + RATIO * path.stat().st_size
