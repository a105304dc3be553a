"""Pictures that a dataset keeps as PNG or JPEG bytes in its parquet columns, by row.

Parquet is compressed in groups of rows: to get at one picture one has to read up to the whole file. So the bytes of a
data file are copied once, when first needed, into an uncompressed Arrow file that is mapped into memory. It takes as
much disk as the pictures themselves and lies in the folder `RLINF_CACHE` (default `~/.cache/rlinf_core`), where it
may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from rlinf_core.errors import UserError


class ParquetImages:
    """The pictures of one data file."""

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self._path = path
        self._table = _mapped(path, columns)

    def image(self, column: str, row: int) -> NDArray[np.uint8]:
        """The picture of `column` in the file's row `row`, decoded to uint8 [height, width, 3] RGB.

        Raises:
            UserError: There are no bytes, or they are no picture.
        """
        value = self._table[column][row]
        if not value.is_valid:
            raise UserError(
                f"{self._path}: row {row} of {column!r} holds no picture (only the path of one?): write the dataset "
                "with embedded images"
            )
        try:
            with Image.open(io.BytesIO(value.as_buffer())) as image:
                return np.asarray(image.convert("RGB"))
        except OSError as e:
            raise UserError(f"{self._path}: the picture in row {row} of {column!r} is damaged: {e}") from e


def cache_folder() -> Path:
    """Where unpacked columns are kept."""
    default = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "rlinf_core"
    return Path(os.environ.get("RLINF_CACHE", default)).expanduser()


def _mapped(path: Path, columns: Sequence[str]) -> pa.Table:
    """Map the unpacked columns, unpacking them first if no process has done so yet."""
    status = path.stat()
    key = repr((str(path.resolve()), status.st_size, status.st_mtime_ns, tuple(columns)))
    unpacked = cache_folder() / "images" / f"{hashlib.blake2b(key.encode(), digest_size=16).hexdigest()}.arrow"
    if not unpacked.exists():
        try:
            _unpack(path, columns, unpacked)
        except OSError as e:
            raise UserError(
                f"the pictures of {path} cannot be unpacked into {unpacked.parent}: {e}. "
                "Make room there, or set RLINF_CACHE to a folder with enough space"
            ) from e
    return pa.ipc.open_file(pa.memory_map(str(unpacked))).read_all()


def _unpack(path: Path, columns: Sequence[str], unpacked: Path) -> None:
    """Write aside and rename, so that processes that do it at the same time do not disturb each other."""
    unpacked.parent.mkdir(parents=True, exist_ok=True)
    aside = unpacked.with_suffix(f".{os.getpid()}.tmp")
    schema = pa.schema([(column, pa.binary()) for column in columns])
    try:
        with pq.ParquetFile(path) as file, pa.OSFile(str(aside), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            for batch in file.iter_batches(batch_size=64, columns=list(columns)):
                writer.write_batch(pa.record_batch([batch[column].field("bytes") for column in columns], schema=schema))
        aside.replace(unpacked)
    finally:
        with contextlib.suppress(FileNotFoundError):
            aside.unlink()
