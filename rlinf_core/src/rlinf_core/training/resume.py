"""Where a run starts: afresh, from its last checkpoint, or not at all because it is finished (contract 9)."""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rlinf_core.config.load import diff_tables, dump_config, read_toml
from rlinf_core.config.run import RunConfig
from rlinf_core.errors import UserError
from rlinf_core.files import find_obstacle, write_text
from rlinf_core.training.position import Position, latest, read_position

MAY_CHANGE = frozenset(
    {
        *("cluster", "data.num_workers"),
        *("runner.max_steps", "runner.max_epochs", "runner.save_interval", "runner.keep_last", "runner.save_best"),
        *("runner.val_check_interval", "runner.val_samples", "runner.best_metric"),
        *("runner.early_stop_patience", "runner.early_stop_min_delta"),
        *("runner.resume", "runner.output_dir", "runner.loggers"),
        *("trainer.device", "trainer.micro_batch_size", "trainer.min_unit_size", "trainer.num_replicas"),
        *("trainer.reshard_after_forward", "trainer.reduce_every_micro_batch", "trainer.activation_checkpointing"),
        *("trainer.compile", "trainer.cpu_offload", "trainer.ema_device"),
    }
)
"""Keys and tables that may differ when a run goes on: they change a step by no more than rounding."""


@dataclass(frozen=True)
class Start:
    """Where a run starts."""

    step: int = 0
    """Steps that are already done."""
    checkpoint: Path | None = None
    """The checkpoint to continue from; None: from the initial weights."""
    finished: bool = False
    """Nothing is left to do."""
    replaced: Path | None = None
    """The run that `--overwrite` moved aside; it is removed once its successor is ready to train."""


def check_folder(run: RunConfig) -> None:
    """Raise `UserError` where the run's folder cannot be made or written to; nothing is made."""
    if why := find_obstacle(run.folder):
        raise _cannot_hold(run, why)


def _cannot_hold(run: RunConfig, why: str) -> UserError:
    return UserError(
        f"runner.output_dir = {run.runner.output_dir!r} cannot hold the run {run.runner.name!r}: {why}. "
        "Name another folder"
    )


@contextmanager
def hold_folder(run: RunConfig) -> Iterator[None]:
    """Keep other processes from the run's folder for as long as this one lives. Called on rank 0.

    Raises:
        UserError: Another process holds it, or the output folder cannot be written to.
    """
    path = run.folder.with_name(f".{run.folder.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    except OSError as error:
        raise _cannot_hold(run, str(error)) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise UserError(
                f"{run.folder} is in use by {file.read() or 'another process'}. Wait for it, end it, or give another "
                "runner.name."
            ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield  # The lock goes with the process, however it ends; the file may stay.


def find_start(run: RunConfig, *, restarted: bool = False) -> Start:
    """Where the run starts, from what is in its folder; touches nothing.

    Args:
        run: The run.
        restarted: torchrun started the processes again after a failure, with the same arguments: what is there is this
            run's own, which `runner.resume = "never"` does not mean.

    Raises:
        UserError: If going on would mix two runs, or overwrite one, or if the folder is none that can be read.
    """
    folder, saved = run.folder, run.folder / "config.toml"
    try:
        holds_something = folder.exists() and any(folder.iterdir())
    except OSError as error:
        raise _cannot_hold(run, str(error)) from error
    if holds_something and not restarted:
        if not saved.exists():
            raise UserError(f"{folder} is not empty and holds no run. Choose another runner.name or runner.output_dir.")
        if run.runner.resume == "never":
            raise UserError(
                f"{folder} already holds a run and runner.resume is 'never'. "
                "Give another runner.name, or --overwrite to remove it."
            )
    checkpoint = latest(folder)
    metrics = folder / "metrics.jsonl"
    if checkpoint or (metrics.exists() and metrics.stat().st_size):
        _refuse_other_config(run, saved)
    if checkpoint is None:
        return Start()
    position = read_position(checkpoint)
    return Start(position.step, checkpoint, finished=_is_finished(run, position))


def say_finished(run: RunConfig, start: Start) -> str:
    """What to tell who starts a finished run."""
    limits = "runner.max_steps, runner.max_epochs or runner.early_stop_patience"
    return f"{run.runner.name} is finished: its {start.step} steps are in {run.folder} (see {limits})."


def prepare_folder(run: RunConfig, *, overwrite: bool, restarted: bool = False) -> Start:
    """Decide where the run starts and leave its folder ready, with `config.toml` in it. Called on rank 0.

    Args:
        run: The run.
        overwrite: Move a run of this name aside and start afresh, unless restarted.
        restarted: See `find_start`.

    Raises:
        UserError: If going on would mix two runs, or overwrite one.
    """
    if overwrite and not restarted and (run.folder / "config.toml").exists():
        start = Start(replaced=_move_aside(run.folder))
    else:
        start = find_start(run, restarted=restarted)
    if not start.finished:
        run.folder.mkdir(parents=True, exist_ok=True)
        write_text(run.folder / "config.toml", dump_config(run))
    return start


def _is_finished(run: RunConfig, position: Position) -> bool:
    """Whether nothing is left to do; raising a limit, or the patience, makes a finished run go on."""
    runner = run.runner
    if position.best.improves_no_more(runner.best_metric, runner.early_stop_patience):
        return True
    if runner.val_check_interval and position.validated < position.step:
        return False  # At least the last validation is still to be done.
    return position.step >= runner.stop_step(position.rows // run.trainer.global_batch_size)


def _move_aside(folder: Path) -> Path:
    aside = folder.with_name(f".{folder.name}.replaced")
    if aside.exists() and latest(folder) is None:
        shutil.rmtree(folder)  # Left by an --overwrite that was killed; what it replaced is still aside.
    else:
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
    return aside


def put_back(run: RunConfig, start: Start) -> None:
    """Undo `--overwrite`: the successor never came to train. Called on rank 0."""
    if start.replaced:
        shutil.rmtree(run.folder)
        start.replaced.rename(run.folder)


def remove_replaced(start: Start) -> None:
    """Finish `--overwrite`: the successor is ready to train. Called on rank 0."""
    if start.replaced:
        shutil.rmtree(start.replaced)


def _refuse_other_config(run: RunConfig, saved: Path) -> None:
    old, new = read_toml(saved), read_toml(dump_config(run))
    changed = [change for change in diff_tables(old, new) if not {change[0], change[0].split(".")[0]} & MAY_CHANGE]
    if changed:
        lines = "\n".join(f"  {key}: {before!r} -> {after!r}" for key, before, after in changed)
        raise UserError(
            f"{run.folder} holds a run with another config:\n{lines}\n"
            "Continue it with its own config, give another runner.name, or --overwrite to remove it and start afresh."
        )
