"""A checkpoint's files in the format of `torch.distributed.checkpoint`: hashed while written, read as untrusted input.

The format's index, `.metadata`, is a pickle, and a pickle can run code. Here it may name only the classes that such an
index consists of, and take no more time and memory than its size; the shards themselves are read with `weights_only`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import io
import os
import pickle
import uuid
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from torch.futures import Future

from rlinf_core.errors import UserError
from rlinf_core.process.watchdog import watchdog
from rlinf_core.torch_names import (
    DefaultSavePlanner,
    FileSystem,
    FileSystemReader,
    FileSystemWriter,
    Metadata,
    SavePlan,
    SavePlanner,
    WriteResult,
    forget_plans,
    set_plan_key,
)
from rlinf_core.training.checkpoint.state import FileDigest
from rlinf_core.untrusted.pickles import check_pickle

INDEX = ".metadata"
INDEX_NAMES: Mapping[str, frozenset[str]] = {
    "torch": frozenset({"Size", "float64", "float32", "float16", "bfloat16", "int64", "int32", "bool", "uint8"}),
    "torch.serialization": frozenset({"_get_layout"}),
    "torch.distributed.checkpoint.metadata": frozenset(
        {
            *("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "ChunkStorageMetadata"),
            *("TensorProperties", "_MEM_FORMAT_ENCODING"),
        }
    ),
    "torch.distributed.checkpoint.filesystem": frozenset({"_StorageInfo"}),
    "collections": frozenset({"OrderedDict"}),
}
"""What the index may name, by module; all of these only hold values. `BytesStorageMetadata` is left out: its data would
be unpickled without `weights_only`, and checkpoints hold only tensors."""


class HashedFile:
    """A file that is written sequentially and hashed on the way."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._hash, self._size = file, hashlib.sha256(), 0
        self.failure: OSError | None = None
        """Why writing failed: torch.save, which calls from C++, raises its own RuntimeError instead."""

    def write(self, data: Any) -> int:
        """Append."""
        self._hash.update(data)
        try:
            written = self._file.write(data)
        except OSError as error:
            self.failure = self.failure or error
            raise
        self._size += written
        watchdog.progress()
        return written

    def tell(self) -> int:
        """Bytes written so far."""
        return self._size

    def flush(self) -> None:
        """Flush the buffer to the operating system."""
        self._file.flush()

    def close(self) -> None:
        """Sync to disk and close."""
        if not self._file.closed:
            with self._file:
                self._file.flush()
                os.fsync(self._file.fileno())

    def digest(self) -> FileDigest:
        """Size and hash of what was written."""
        return FileDigest(self._size, self._hash.hexdigest())


class HashingFiles(FileSystem):
    """A file system whose files are synced and hashed as they are written."""

    def __init__(self) -> None:
        self.digests: dict[str, FileDigest] = {}
        self.failure: OSError | None = None
        """Why a file could not be written; torch's writers replace some errors by their own."""

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Generator[Any, None, None]:
        """Open a file for writing."""
        try:
            with Path(path).open(mode) as file:
                stream = HashedFile(file)
                try:
                    yield stream
                finally:
                    self.failure = self.failure or stream.failure
                stream.close()
            self.digests[Path(path).name] = stream.digest()
        except OSError as error:
            self.failure = self.failure or error
            raise


class ShardWriter(FileSystemWriter):
    """Writes this rank's shards, and on the coordinator the index.

    Args:
        folder: The folder to write to; it exists and is empty.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, sync_files=False, per_thread_copy_ahead=0)  # HashedFile syncs.
        self.files = HashingFiles()
        self.fs = self.files

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write the shards."""
        try:
            with watchdog.waiting(False):  # torch waits for other ranks before and after.
                return super().write_data(plan, planner)
        except Exception as error:
            if self.files.failure is not None and not isinstance(error, OSError):
                raise self.files.failure from error
            raise

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the index under its final name: a folder counts as a checkpoint only once it has `state.json`."""
        storage = {result.index: result.storage_data for of_rank in results for result in of_rank}
        # Without storage_meta, which is the folder's current path: checkpoints may be moved.
        metadata = dataclasses.replace(metadata, version="1.0.0", storage_data=storage, storage_meta=None)
        with self.files.create_stream(Path(self.path) / INDEX, "wb") as stream:
            pickle.dump(metadata, stream)


class Planner(DefaultSavePlanner):
    """Plans once which rank writes what, and again only if a plan changes or a save has failed."""

    def __init__(self) -> None:
        super().__init__(enable_plan_caching=True)
        set_plan_key(self, f"{__name__}-{uuid.uuid4()}")  # torch's caches are global to the process.

    def forget(self) -> None:
        """Drop the plans."""
        forget_plans(self)


class ShardReader(FileSystemReader):
    """Reads a checkpoint from an untrusted source."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index.

        Raises:
            UserError: It is not a valid index, or names something that does not belong in one.
        """
        path = Path(self.path) / INDEX
        try:
            data = path.read_bytes()
            check_pickle(data)
            metadata = _IndexUnpickler(io.BytesIO(data)).load()
            if not isinstance(metadata, Metadata):
                raise pickle.UnpicklingError(f"it holds a {type(metadata).__name__}")
            for entry in metadata.storage_data.values():
                if Path(entry.relative_path).name != entry.relative_path:
                    raise pickle.UnpicklingError(f"it names a file outside of the checkpoint: {entry.relative_path}")
        except Exception as error:  # Unpickling damaged bytes raises nearly anything.
            raise UserError(f"{path} cannot be read: {error}. Choose another checkpoint.") from error
        return metadata


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in INDEX_NAMES.get(module, ()):
            return getattr(importlib.import_module(module), name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which does not belong in an index")
