"""Read parquet files that come from anywhere, in bounded memory. Plugins may use this module.

A parquet file of a few kilobytes can claim terabytes: a value that is repeated takes no space. So before anything is
decoded, the footer is added up: what the wanted columns claim may take `FREE` bytes in memory plus `RATIO` times the
size of the file. Columns of texts and images are read in batches, because a dictionary holds a long text once for many
rows, and the footer does not say how often. Recorded data takes less than 100 times the size of its file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from rlinf_core.errors import UserError
from rlinf_core.untrusted import check_file

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
    footer, everything, names = file.metadata, columns is None, frozenset(columns or ())
    inside = tuple(f"{name}." for name in names)  # A leaf of the column `action` is `action.list.element`.
    claimed = repeated = longest = 0
    for group in range(footer.num_row_groups):
        part = footer.row_group(group)
        rows = part.num_rows
        for number in range(part.num_columns):
            chunk = part.column(number)
            leaf = chunk.path_in_schema
            if not (everything or leaf in names or leaf.startswith(inside)):
                continue
            kind, size, values = chunk.physical_type, chunk.total_uncompressed_size, chunk.num_values
            if min(size, values, rows) < 0:
                raise UserError(f"{path} is damaged: its footer counts less than nothing. Download or write it again")
            width = file.schema.column(number).length if kind == "FIXED_LEN_BYTE_ARRAY" else _BYTES[kind]
            claimed += max(values, rows) * width
            if kind == "BYTE_ARRAY":
                claimed, repeated, longest = claimed + size, repeated + values * size, max(longest, size)
    if claimed > _limit(path):
        raise _too_large(path, f"{claimed / 1e9:.3g} GB")
    return Claims(claimed, repeated, longest)


def _too_large(path: Path, how_much: str) -> UserError:
    size = path.stat().st_size
    return UserError(
        f"{path} has {size / 1e3:.3g} kB, but its columns take {how_much} in memory; at most "
        f"{_limit(path) / 1e9:.2g} GB are accepted from a file of this size. It is damaged, or made to exhaust memory: "
        "download or write it again. If it is yours, split it into several files, or write it without compression"
    )


def _limit(path: Path) -> int:
    return FREE + RATIO * path.stat().st_size
