"""Read images that a dataset stores as PNG or JPEG bytes in parquet columns, by row.

Parquet is compressed in groups of rows, so reading one image may mean reading the whole file. Therefore the image bytes
of a data file are copied once, when first needed, to an uncompressed Arrow file, which is memory-mapped. It takes as
much disk as the images themselves, is in the cache (`rlinf_core.cache`), and may be deleted at any time.

Each image has a checksum, which is compared whenever the image is read: 0.01 ms for 20 kB, where decoding takes 0.5 ms.
An unpacked image that has changed is reported as the cache's, and the file is unpacked again.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rlinf_core.cache import cache_folder, cache_key, remove_abandoned, replacing
from rlinf_core.data.images.pictures import decode
from rlinf_core.errors import UserError
from rlinf_core.terminal import warn
from rlinf_core.untrusted.parquet import open_parquet, read_batches
from rlinf_core.untrusted.text import check_file, path_inside

LAYOUT = 2
"""Version of the unpacked files; part of their names. 2: with checksums."""


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
        self._path, self._columns, self._root = path, columns, root
        self._unpacked = _unpacked_file(path, columns)
        self._table = self._open()

    def image(self, column: str, row: int) -> NDArray[np.uint8]:
        """The image of `column` in the file's row `row`, decoded to uint8 [height, width, 3] RGB.

        Raises:
            UserError: There are no bytes, or they are not an image.
        """
        return decode(self._data(column, row), f"{self._path}: row {row} of {column!r}")

    def _data(self, column: str, row: int) -> pa.Buffer | None:
        """The bytes of an image; None if the dataset has none. Unpacked ones that have changed are unpacked again."""
        for _ in range(2):
            value = self._table[column][row]
            if _checksum(value) == self._table[_checksums_of(column)][row].as_py():
                return value.as_buffer() if value.is_valid else None
            self._table = self._again(f"row {row} of {column!r} has changed since it was written")
        raise UserError(
            f"{self._unpacked}: row {row} of {column!r} is damaged again as soon as it is written: set RLINF_CACHE to "
            "a folder on another disk"
        )

    def _open(self) -> pa.Table:
        """Map the unpacked images, unpacking them if no process has done so or what is there is damaged."""
        try:
            return _map(self._unpacked, self._columns)
        except FileNotFoundError:
            return self._again()
        except (OSError, ValueError, pa.ArrowException) as error:
            return self._again(str(error))

    def _again(self, damage: str = "") -> pa.Table:
        if damage:
            warn(f"the cache is damaged: {self._unpacked}: {damage}. It is written again from {self._path}")
        try:
            _unpack(image_batches(self._path, self._columns, self._root), self._unpacked)
            return _map(self._unpacked, self._columns)
        except (OSError, ValueError, pa.ArrowException) as e:
            raise UserError(
                f"the images of {self._path} cannot be unpacked into {self._unpacked.parent}: {e}. "
                "Make room there, or set RLINF_CACHE to a folder with enough space"
            ) from e


def image_batches(path: Path, columns: Sequence[str], root: Path) -> Iterator[pa.RecordBatch]:
    """The image bytes of a file, 64 rows at a time: one `binary` array per column, null for a missing image.

    An image may be in the column itself, in its field `bytes`, or (in old datasets) in a separate file that the field
    `path` names relative to the dataset's folder.

    Raises:
        UserError: The file cannot be read, or lacks a column.
    """
    schema = pa.schema([(column, pa.binary()) for column in columns])
    try:
        with open_parquet(path) as file:
            there = file.schema_arrow.names
            if missing := [name for name in columns if there.count(name) != 1]:
                what = "has more than once" if missing[0] in there else "lacks"
                raise UserError(f"{path} {what} the columns {', '.join(missing)}: write or download the dataset again")
            for batch in read_batches(file, path, columns, rows=64):
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


def _unpacked_file(path: Path, columns: Sequence[str]) -> Path:
    """Where the images of a file are unpacked, by everything that shows that the file is still the same."""
    try:
        check_file(path)
        status = path.stat()
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e}. Download or write the dataset again") from e
    key = cache_key(LAYOUT, str(path.resolve()), status.st_size, status.st_mtime_ns, tuple(columns))
    return cache_folder() / "images" / f"{key}.arrow"


def _unpack(batches: Iterator[pa.RecordBatch], unpacked: Path) -> None:
    """Write the images with their checksums. Other processes may do so too: the file is the same."""
    unpacked.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(unpacked.parent)
    with replacing(unpacked) as aside:
        first = next(batches)
        columns = first.schema.names
        schema = pa.schema([*first.schema, *(pa.field(_checksums_of(name), pa.uint32()) for name in columns)])
        with pa.OSFile(str(aside), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            for batch in itertools.chain([first], batches):
                found = [pa.array(map(_checksum, column), pa.uint32()) for column in batch.columns]
                writer.write_batch(pa.record_batch([*batch.columns, *found], schema=schema))


def _map(unpacked: Path, columns: Sequence[str]) -> pa.Table:
    """Map unpacked images.

    Raises:
        OSError: The file is missing or cannot be read.
        ValueError, pyarrow.ArrowException: It is damaged, or of another layout.
    """
    table = pa.ipc.open_file(pa.memory_map(str(unpacked))).read_all()
    if table.schema.names != [*columns, *map(_checksums_of, columns)]:
        raise ValueError(f"it has the columns {', '.join(table.schema.names)}")
    if not all(one.type in (pa.binary(), pa.uint32()) for one in table.schema):
        raise ValueError("its columns have other types")
    table.validate(full=True)  # Of the places of images: a wrong one would end the process.
    return table


def _checksum(value: pa.BinaryScalar) -> int | None:
    return zlib.crc32(value.as_buffer()) if value.is_valid else None


def _checksums_of(column: str) -> str:
    """The column with the checksums of a column of images."""
    return f"{column} (CRC-32)"
