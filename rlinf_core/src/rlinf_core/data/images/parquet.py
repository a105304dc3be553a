"""Read images that a dataset stores as PNG or JPEG bytes in parquet columns, by row.

Parquet is compressed in groups of rows, so reading one image may mean reading the whole file. Therefore the image bytes
of a data file are copied once, when first needed, to an uncompressed Arrow file, which is memory-mapped. It takes as
much disk as the images themselves, is in the folder `RLINF_CACHE` (default `~/.cache/rlinf_core`), and may be deleted
at any time.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from rlinf_core.data.images.pictures import decode
from rlinf_core.errors import UserError
from rlinf_core.untrusted import path_inside


class ParquetImages:
    """The images of one data file."""

    def __init__(self, path: Path, columns: Sequence[str], root: Path) -> None:
        """Map the images of a file, unpacking them if no process has done so.

        Args:
            path: The data file.
            columns: Its image columns.
            root: The dataset's folder, which contains images that are separate files.

        Raises:
            UserError: The file cannot be read, or there is not enough disk to unpack it.
        """
        self._path = path
        self._table = _mapped(path, columns, root)

    def image(self, column: str, row: int) -> NDArray[np.uint8]:
        """The image of `column` in the file's row `row`, decoded to uint8 [height, width, 3] RGB.

        Raises:
            UserError: There are no bytes, or they are not an image.
        """
        value = self._table[column][row]
        return decode(value.as_buffer() if value.is_valid else None, f"{self._path}: row {row} of {column!r}")


def image_batches(path: Path, columns: Sequence[str], root: Path) -> Iterator[pa.RecordBatch]:
    """The image bytes of a file, 64 rows at a time: one `binary` array per column, null for a missing image.

    An image may be in the column itself, in its field `bytes`, or (in old datasets) in a separate file that the field
    `path` names relative to the dataset's folder.

    Raises:
        UserError: The file cannot be read, or lacks a column.
    """
    schema = pa.schema([(column, pa.binary()) for column in columns])
    try:
        with pq.ParquetFile(path) as file:
            there = file.schema_arrow.names
            if missing := [name for name in columns if there.count(name) != 1]:
                what = "has more than once" if missing[0] in there else "lacks"
                raise UserError(f"{path} {what} the columns {', '.join(missing)}: write or download the dataset again")
            for batch in file.iter_batches(batch_size=64, columns=list(columns)):
                yield pa.record_batch([_bytes_of(batch[column], root) for column in columns], schema=schema)
    except (OSError, pa.ArrowException) as e:
        raise UserError(f"{path} cannot be read: {e}. Download or write the dataset again") from e


def _bytes_of(column: pa.Array, root: Path) -> pa.Array:
    if not pa.types.is_struct(column.type):
        plain = pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)
        return column.cast(pa.binary()) if plain else pa.nulls(len(column), pa.binary())
    data = column.field("bytes") if column.type.get_field_index("bytes") >= 0 else pa.nulls(len(column), pa.binary())
    if not data.null_count or column.type.get_field_index("path") < 0:
        return data
    paths = column.field("path").to_pylist()
    pairs = zip(data.to_pylist(), paths, strict=True)
    return pa.array([_file_bytes(root, path) if one is None and path else one for one, path in pairs], pa.binary())


def _file_bytes(root: Path, path: str) -> bytes | None:
    """An image in a separate file; None if it is missing or outside the dataset's folder."""
    try:
        file = path_inside(root, path)
        return file.read_bytes() if file.is_file() else None
    except (OSError, ValueError):  # The path is too long, or leaves the folder.
        return None


def cache_folder() -> Path:
    """The folder of everything that is cached."""
    default = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "rlinf_core"
    return Path(os.environ.get("RLINF_CACHE", default)).expanduser()


def _mapped(path: Path, columns: Sequence[str], root: Path) -> pa.Table:
    """Map the unpacked columns, unpacking them first if no process has done so yet."""
    try:
        status = path.stat()
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e}. Download or write the dataset again") from e
    key = repr((str(path.resolve()), status.st_size, status.st_mtime_ns, tuple(columns)))
    unpacked = cache_folder() / "images" / f"{hashlib.blake2b(key.encode(), digest_size=16).hexdigest()}.arrow"
    if not unpacked.exists():
        try:
            _unpack(image_batches(path, columns, root), unpacked)
        except OSError as e:
            raise UserError(
                f"the images of {path} cannot be unpacked into {unpacked.parent}: {e}. "
                "Make room there, or set RLINF_CACHE to a folder with enough space"
            ) from e
    return pa.ipc.open_file(pa.memory_map(str(unpacked))).read_all()


def _unpack(batches: Iterator[pa.RecordBatch], unpacked: Path) -> None:
    """Write to a temporary file and rename it, so that concurrent processes do not interfere."""
    unpacked.parent.mkdir(parents=True, exist_ok=True)
    aside = unpacked.with_suffix(f".{os.getpid()}.tmp")
    try:
        first = next(batches)
        with pa.OSFile(str(aside), "wb") as sink, pa.ipc.new_file(sink, first.schema) as writer:
            for batch in itertools.chain([first], batches):
                writer.write_batch(batch)
        aside.replace(unpacked)
    finally:
        with contextlib.suppress(FileNotFoundError):
            aside.unlink()
