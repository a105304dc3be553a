"""Write a checkpoint atomically: to a temporary folder, fsynced and hashed, then renamed.

If one rank fails, all ranks know and nothing is left. Everything here runs in a thread per rank while training
continues, over its own process group: nothing that training sends meanwhile can interfere, and ranks may start a save
at different times.
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from rlinf_core.files import sync_folder, write_text
from rlinf_core.process.watchdog import watchdog
from rlinf_core.shared_files import has_sizes, lag, name_process, wait_until_seen
from rlinf_core.terminal import warn
from rlinf_core.torch_names import CheckpointException, write_shards
from rlinf_core.training.checkpoint.shards import HashedFile, Planner, ShardWriter
from rlinf_core.training.checkpoint.state import (
    NAMES,
    STATE,
    FileDigest,
    Position,
    State,
    dump_state,
    read_state,
    step_name,
)

THREAD = "save "
"""Prefix of the names of threads that write checkpoints."""
TIMEOUT = timedelta(hours=2)
"""How long ranks wait for one another's files; a rank that died or hangs is noticed much sooner."""


class SaveError(Exception):
    """A file could not be written on some rank; raised on all of them, with the same message."""


@dataclass(frozen=True)
class Retention:
    """Which checkpoints are kept."""

    last: int
    """How many of the newest."""
    every: int = 0
    """Also those whose step is a multiple of this; 0: no others."""

    def expired(self, names: list[str], best: str) -> list[str]:
        """The checkpoints to remove.

        Args:
            names: All checkpoints.
            best: One that is kept in any case.
        """
        old = sorted(names)[: -self.last]
        kept = {best} | {name for name in old if self.every and int(name.removeprefix("step_")) % self.every == 0}
        return [name for name in old if name not in kept]


class Own(NamedTuple):
    """Which checkpoints are a run's own: those that it has written, the one that it loaded, and earlier ones than that.

    No others are removed or replaced: the run may not have seen them at its start, or not as they were.
    """

    loaded: str = ""
    """Name of the checkpoint that the run started from; empty if it started from scratch."""
    made: frozenset[str] = frozenset()
    """Names of those that it has written since."""

    def has(self, name: str) -> bool:
        """Whether a checkpoint is the run's own."""
        return name in self.made or name <= self.loaded


NOTHING = Own()


@dataclass(frozen=True)
class CheckpointFolder:
    """Where a run's checkpoints are, and which of them are kept."""

    run_folder: Path
    """The run's folder, with the files `latest` and `best`."""
    checkpoints: Path
    """The folder of the checkpoints."""
    retention: Retention
    rename: bool = True
    """Whether folders can be renamed there; if not, checkpoints are written directly under their final names."""
    contents: Mapping[str, bytes] = field(default_factory=dict)
    """Further files of every checkpoint: name -> content. Only rank 0 needs them."""

    def temporary(self, step: int) -> Path:
        """Where a checkpoint is while it is written."""
        name = step_name(step)
        return self.checkpoints / (f".{name}.tmp" if self.rename else name)

    def path(self, step: int) -> Path:
        """Where a complete checkpoint is."""
        return self.checkpoints / step_name(step)


class Writers:
    """The ranks as writers of checkpoints. Created on every rank, in the training thread.

    Args:
        rank: This rank.
    """

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.group = dist.new_group(backend="gloo", timeout=TIMEOUT)
        self.planner = Planner()

    def first(self, action: Callable[[], None]) -> None:
        """Run an action on rank 0 while all ranks wait for it.

        Raises:
            SaveError: The action failed.
        """
        box: list[str] = [""]
        if self.rank == 0:
            try:
                action()
            except (OSError, SaveError) as error:
                box = [_in_words(error)]
        with watchdog.waiting():
            dist.broadcast_object_list(box, src=0, group=self.group)
        if box[0]:
            raise SaveError(box[0])

    def write(self, folder: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, Mapping[str, FileDigest]]:
        """Write the shards of all ranks.

        Returns:
            On rank 0: process, as messages name it -> file -> digest. Nothing on other ranks.

        Raises:
            SaveError: Some rank could not write.
        """
        writer = ShardWriter(folder)
        try:
            with watchdog.waiting():  # Except while `writer` works.
                write_shards(dict(tensors), storage_writer=writer, planner=self.planner, process_group=self.group)
        except CheckpointException as error:
            self.planner.forget()
            causes = {rank: failure[0] for rank, failure in error.failures.items()}
            if not all(isinstance(cause, OSError) for cause in causes.values()):
                raise RuntimeError(str(error)) from error  # CheckpointException does not derive from Exception.
            raise SaveError("; ".join(f"rank {rank}: {_in_words(cause)}" for rank, cause in causes.items())) from error
        mine = name_process(self.rank), writer.files.digests
        gathered = [mine] * dist.get_world_size(self.group)
        with watchdog.waiting():
            dist.gather_object(mine, gathered if self.rank == 0 else None, dst=0, group=self.group)
        return dict(gathered) if self.rank == 0 else {}


def _in_words(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f": {error.filename}" if error.filename else "")
    return str(error)


def write_checkpoint(
    folder: CheckpointFolder,
    position: Position,
    tensors: Mapping[str, torch.Tensor],
    writers: Writers,
    *,
    best: str = "",
    own: Own = NOTHING,
) -> int:
    """Write a checkpoint; called on every rank, in the same order of checkpoints.

    Args:
        folder: Where to.
        position: The run's position.
        tensors: The tensors to save; they must not change meanwhile.
        writers: All ranks.
        best: The checkpoint that the file `best` should name; empty if there is none.
        own: The run's earlier checkpoints. Others are set aside.

    Returns:
        Its size in bytes on rank 0; 0 on other ranks.

    Raises:
        SaveError: Some rank could not write; nothing of the checkpoint is left.
    """
    temporary = folder.temporary(position.step)
    try:
        writers.first(lambda: _make_room(folder, temporary, own))
        written = writers.write(temporary, tensors)
        files = {name: digest for digests in written.values() for name, digest in digests.items()}
        writers.first(lambda: _require_all(temporary, written))
        writers.first(lambda: files.update(_write_contents(folder, temporary)))
        writers.first(lambda: _complete(folder, position, files, best, own))
    except SaveError:
        writers.first(lambda: shutil.rmtree(temporary, ignore_errors=True))
        raise
    writers.first(lambda: _remove_others(folder, folder.path(position.step).name, own, best))
    return sum(entry.bytes for entry in files.values())


def _make_room(folder: CheckpointFolder, temporary: Path, own: Own) -> None:
    folder.checkpoints.mkdir(parents=True, exist_ok=True)
    for unfinished in folder.checkpoints.glob(".step_*.tmp"):
        shutil.rmtree(unfinished)
    if (temporary / STATE).exists() and not own.has(temporary.name):
        _set_aside(folder, temporary)
    elif temporary.exists():
        (temporary / STATE).unlink(missing_ok=True)  # First: without it the folder does not count as a checkpoint.
        shutil.rmtree(temporary)
    temporary.mkdir()


def _require_all(temporary: Path, written: Mapping[str, Mapping[str, FileDigest]]) -> None:
    """Require that rank 0 sees all files where it completes the checkpoint: a machine may have lost the shared folder.

    Raises:
        SaveError: It does not, although it has waited for as long as the file system may hide them.
    """
    if len(written) == 1:
        return
    for process, digests in written.items():
        sizes = {name: digest.bytes for name, digest in digests.items()}
        if wrong := wait_until_seen(partial(has_sizes, temporary, sizes), temporary):
            waited = f" within {limit:g} s" if (limit := lag(temporary)) else ""
            raise SaveError(
                f"{name_process(0)} does not find what {process} has written in {temporary}{waited}: {wrong}. Check "
                "that both machines have the shared folder mounted"
            )


def _write_contents(folder: CheckpointFolder, temporary: Path) -> dict[str, FileDigest]:
    digests = {}
    for name, content in folder.contents.items():
        file = HashedFile((temporary / name).open("wb"))
        with closing(file):
            file.write(content)
        digests[name] = file.digest()
    return digests


def _complete(
    folder: CheckpointFolder, position: Position, files: Mapping[str, FileDigest], best: str, own: Own
) -> None:
    temporary, path = folder.temporary(position.step), folder.path(position.step)
    state = dump_state(State(position, files))
    if folder.rename:
        write_text(temporary / STATE, state)
        sync_folder(temporary)
        if path.exists() and not own.has(path.name):
            _set_aside(folder, path)
        elif path.exists():
            shutil.rmtree(path)
        temporary.rename(path)
    else:
        _write_in_place(path / STATE, state)
    sync_folder(folder.checkpoints)
    name_best(folder, best)
    write_text(folder.run_folder / "latest", path.name)


def _write_in_place(file: Path, text: str) -> None:
    with file.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def _remove_others(folder: CheckpointFolder, name: str, own: Own, best: str) -> None:
    """Remove outdated checkpoints after a save; one that cannot be removed is logged, not fatal.

    Those that are not the run's own were left when it continued from an earlier one, or were not visible when it
    started. They are set aside, as they must not be mistaken for its own once it has passed their steps.
    """
    others = [other for other in folder.checkpoints.glob(NAMES) if other.name != name]
    complete = [other.name for other in others if own.has(other.name) and (other / STATE).exists()]
    kept = set(complete) - set(folder.retention.expired([*complete, name], best))
    for other in others:
        if other.name not in kept:
            # Where folders cannot be renamed, one without `state.json` is what a crash left of a save.
            foreign = not own.has(other.name) and (folder.rename or (other / STATE).exists())
            try:
                _set_aside(folder, other) if foreign else _remove(other)
            except OSError as error:
                what = "set aside" if foreign else "removed"
                warn(f"{other} cannot be {what}: {_in_words(error)}")


def _remove(path: Path) -> None:
    (path / STATE).unlink(missing_ok=True)  # First: without it the folder does not count as a checkpoint.
    shutil.rmtree(path)


def _set_aside(folder: CheckpointFolder, path: Path) -> None:
    """Give a checkpoint a name that no run uses, and report it."""
    targets = (path.with_name(f"{path.name}.aside{number or ''}") for number in itertools.count())
    target = next(target for target in targets if not target.exists())
    if folder.rename:
        path.rename(target)
    else:
        shutil.copytree(path, target)
        _remove(path)
    warn(f"the run has neither written nor loaded {path}, so it was moved to {target}: remove it if you do not need it")


def restate(folder: CheckpointFolder, position: Position, best: str) -> None:
    """Rewrite `state.json` of a position's checkpoint, to record a later validation. Called on rank 0."""
    path = folder.path(position.step)
    state = dump_state(State(position, read_state(path).files))
    (write_text if folder.rename else _write_in_place)(path / STATE, state)
    name_best(folder, best)


def name_best(folder: CheckpointFolder, best: str) -> None:
    """Make the file `best` name a checkpoint; remove the file if that is not complete. Called on rank 0."""
    if best and (folder.checkpoints / best / STATE).exists():
        write_text(folder.run_folder / "best", best)
    else:
        (folder.run_folder / "best").unlink(missing_ok=True)
