"""Whose checkpoints lie in a `runner.checkpoint_dir`: two runs of one name must not take turns in one folder.

The run and the folder of its checkpoints hold the same file, so that both may be moved, from one machine to another,
too. Torch-free.
"""

from __future__ import annotations

import os
import uuid
from pathlib import Path

from rlinf_core.config.load import read_toml
from rlinf_core.contract.run import RunConfig
from rlinf_core.errors import UserError
from rlinf_core.files import write_text, writing
from rlinf_core.training.checkpoint.state import NAMES, candidates

FILE = "owner"
"""A line: a random number, and the folder of the run when it was written."""


def refuse_foreign(run: RunConfig, *, overwrite: bool = False) -> None:
    """Find out whether the folder for the checkpoints is another run's; nothing is touched.

    Args:
        run: The run.
        overwrite: Whether what is there is to be removed.

    Raises:
        UserError: It is; or this run's own are still where its config so far says.
    """
    if not overwrite:
        _refuse_left_behind(run)
    if not run.runner.checkpoint_dir:
        return
    _refuse_owned(run)
    if (run.checkpoints / FILE).exists() or not any(run.checkpoints.glob(NAMES)):
        return
    before, wanted = _checkpoints_before(run), candidates(run.folder, run.checkpoints)
    moved_here = not overwrite and bool(wanted) and wanted[0].exists()
    if not moved_here and (before is None or not _same(before, run.checkpoints)):
        raise UserError(
            f"{run.checkpoints} holds checkpoints of a run that is not in {run.folder}: give another runner.name or "
            "runner.checkpoint_dir, or remove that folder."
        )


def claim(run: RunConfig, replaced: Path | None) -> None:
    """Leave the run's mark where its checkpoints will lie. Called on rank 0, while the run's folder is held.

    Args:
        run: The run.
        replaced: The run that this one replaces, whose checkpoints are its to remove.

    Raises:
        UserError: Another run was first, or nothing can be written there.
    """
    if not run.runner.checkpoint_dir:
        return
    mark, note = run.folder / FILE, run.checkpoints / FILE
    with writing(run.checkpoints, "Name another runner.checkpoint_dir"):
        run.checkpoints.mkdir(parents=True, exist_ok=True)
        if not mark.exists():
            text = _read(replaced / FILE) if replaced else ""
            write_text(mark, text or f"{uuid.uuid4().hex} {run.folder.absolute()}\n")
        if replaced:
            write_text(replaced / FILE, _read(mark))  # It may have to come back.
        try:
            with note.open("x", encoding="utf-8") as file:
                file.write(_read(mark))
        except FileExistsError:
            _refuse_owned(run)


def _refuse_owned(run: RunConfig) -> None:
    note = run.checkpoints / FILE
    if note.exists() and _read(note) != _read(run.folder / FILE):
        whose = _read(note).partition(" ")[2].strip()
        raise UserError(
            f"{run.checkpoints} is for the checkpoints of another run{f', which began in {whose}' if whose else ''}: "
            f"give another runner.name or runner.checkpoint_dir, or, if that run is gone, remove {run.checkpoints}."
        )


def _refuse_left_behind(run: RunConfig) -> None:
    """Raise `UserError` where a run goes on with another folder for checkpoints than the one they lie in."""
    before, wanted = _checkpoints_before(run), candidates(run.folder, run.checkpoints)
    if before and wanted and not wanted[0].exists() and (before / wanted[0].name).exists():
        raise UserError(
            f"runner.checkpoint_dir has changed, and the checkpoints of {run.folder} are still in {before}: move them "
            f"to {run.checkpoints}, or set runner.checkpoint_dir as it was."
        )


def _checkpoints_before(run: RunConfig) -> Path | None:
    """Where the checkpoints lie by the run's config so far; None: it has not begun."""
    saved = run.folder / "config.toml"
    if not saved.exists():
        return None
    given = read_toml(saved).get("runner", {}).get("checkpoint_dir", "")
    return run.runner.model_copy(update={"checkpoint_dir": given}).checkpoints_of(run.folder)


def _same(one: Path, other: Path) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
