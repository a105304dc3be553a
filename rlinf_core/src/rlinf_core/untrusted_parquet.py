"""Read parquet files that come from anywhere, in bounded memory. Plugins may use this module.

A parquet file of a few kilobytes can claim terabytes: a value that is repeated takes no space. So before anything is
decoded, the footer is added up: what the wanted columns claim may take `FREE` bytes in memory plus `RATIO` times the
size of the file. Columns of texts and images are read in batches, because a dictionary holds a long text once for many
rows, and the footer does not say how often. Recorded data takes less than 100 times the size of its file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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
    check_claims(file, path, columns)
    limit, most = _limit(path), sum(values * size for values, size in _texts(file, columns))
    if most <= limit:
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
    check_claims(file, path, columns)
    largest = max((size for _, size in _texts(file, columns)), default=0)
    at_once = (FREE + BATCH_RATIO * path.stat().st_size) // max(largest, 1)
    yield from file.iter_batches(
        batch_size=min(rows, max(at_once, 1)), columns=None if columns is None else list(columns), use_threads=False
    )


def check_claims(file: pq.ParquetFile, path: Path, columns: Sequence[str] | None = None) -> None:
    """Raise `UserError` if columns take too much memory according to the file's footer."""
    claimed = 0
    for kind, length, chunk, rows in _chunks(file, columns):
        width = length if kind == "FIXED_LEN_BYTE_ARRAY" else _BYTES.get(kind, 8)
        size, values = int(chunk.total_uncompressed_size), int(chunk.num_values)
        if min(size, values, rows) < 0:
            raise UserError(f"{path} is damaged: its footer counts less than nothing. Download or write it again")
        claimed += max(values, rows) * width + (size if kind == "BYTE_ARRAY" else 0)
    if claimed > _limit(path):
        raise _too_large(path, f"{claimed / 1e9:.3g} GB")


def _too_large(path: Path, how_much: str) -> UserError:
    size = path.stat().st_size
    return UserError(
        f"{path} has {size / 1e3:.3g} kB, but its columns take {how_much} in memory; at most "
        f"{_limit(path) / 1e9:.2g} GB are accepted from a file of this size. It is damaged, or made to exhaust memory: "
        "download or write it again. If it is yours, split it into several files, or write it without compression"
    )


def _limit(path: Path) -> int:
    return FREE + RATIO * path.stat().st_size


def _texts(file: pq.ParquetFile, columns: Sequence[str] | None) -> list[tuple[int, int]]:
    """For each part of a column of texts or images: its number of values, and the most bytes that one may have."""
    found = _chunks(file, columns)
    return [(chunk.num_values, chunk.total_uncompressed_size) for kind, _, chunk, _ in found if kind == "BYTE_ARRAY"]


def _chunks(file: pq.ParquetFile, columns: Sequence[str] | None) -> Iterator[tuple[str, int, Any, int]]:
    """Physical type, length of a value of fixed length, footer entry, and rows of each part of some columns."""
    schema, footer = file.schema, file.metadata
    leaves = [(number, schema.column(number)) for number in range(len(schema))]
    wanted = [
        (number, leaf.physical_type, leaf.length)
        for number, leaf in leaves
        if columns is None or any(leaf.path == name or leaf.path.startswith(f"{name}.") for name in columns)
    ]
    for group in range(footer.num_row_groups):
        part = footer.row_group(group)
        for number, kind, length in wanted:
            yield kind, length, part.column(number), part.num_rows
