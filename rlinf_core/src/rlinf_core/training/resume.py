"""Where a run starts: at step 0, at its last checkpoint, or nowhere because it is finished (contract 9). Torch-free.

`decide_start` is a pure function of the run's config, the content of its folder (`FolderState`) and the command's
flags; `training.run_folder` reads and writes the folder. In reading order: the values (`Flags`, `FolderState`,
`Start`), the decision, its refusals and notes, and then how the config may change when a run continues (`MAY_CHANGE`).
"""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rlinf_core.config.load import diff_tables, dump_config, read_toml
from rlinf_core.config.toml import dotted, leaves
from rlinf_core.contract.optim import OptimConfig
from rlinf_core.contract.run import RunConfig
from rlinf_core.errors import UserError
from rlinf_core.training.checkpoint.state import Position, none_whole


@dataclass(frozen=True)
class Flags:
    """Command-line flags that affect the start."""

    overwrite: bool = False
    """Replace the run of the same name."""
    allow_change: bool = False
    """Continue with a config that changes what a step computes."""
    restarted: bool = False
    """torchrun restarted the processes with the same arguments: the folder holds this very run, so `overwrite` and
    `runner.resume = "never"` do not apply."""


NO_FLAGS = Flags()


@dataclass(frozen=True)
class CheckpointDir:
    """The checkpoint folder and its owner."""

    obstacle: str = ""
    """Why it cannot be created or written; empty if it can."""
    owner: str | None = None
    """Content of its owner file; None if it has none."""
    run_owner: str = ""
    """Content of the owner file in the run's folder; empty if it has none."""
    holds_checkpoints: bool = False
    """Whether it contains any checkpoint."""
    wanted_here: bool = False
    """Whether it contains the checkpoint named by `latest`."""
    before: Path | None = None
    """The checkpoint folder according to the run's saved config; None if there is no saved config."""
    is_before: bool = False
    """Whether `before` is this same folder, after resolving links."""
    wanted_before: bool = False
    """Whether `before` contains the checkpoint named by `latest`; or any, if this folder contains none."""


@dataclass(frozen=True)
class FolderState:
    """What is in a run's folder before a start; `training.run_folder.read_folder` reads it."""

    obstacle: str = ""
    """Why the folder cannot be created, read or written; empty if it can."""
    is_empty: bool = True
    """Whether it is missing or empty."""
    has_config: bool = False
    """Whether it has a `config.toml`, i.e. belongs to a run."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """The content of that `config.toml`."""
    foreign: str = ""
    """A file that makes it look like a run's folder but is not of this project; empty if there is none."""
    has_metrics: bool = False
    """Whether any step was logged."""
    checkpoint: Path | None = None
    """The newest checkpoint with no known damage."""
    position: Position | None = None
    """Its position in the run."""
    pointer: str = ""
    """What is wrong with the file `latest`; empty if nothing is, or if there are no checkpoints."""
    damaged: Mapping[str, str] = field(default_factory=dict)
    """Name of each newer checkpoint -> its damage, newest first."""
    later: tuple[str, ...] = ()
    """All checkpoints newer than `checkpoint`, damaged or not."""
    error: UserError | None = None
    """Why the config or the checkpoints cannot be read; raised unless `Flags.overwrite` is set."""
    changed_here: bool = False
    """Whether the config was changed at this checkpoint, with `--allow-change`, and no step has been saved since."""
    checkpoint_dir: CheckpointDir = field(default_factory=CheckpointDir)


@dataclass(frozen=True)
class Start:
    """Where a run starts."""

    step: int = 0
    """Finished steps."""
    checkpoint: Path | None = None
    """The checkpoint to continue from; None to start from the initial weights."""
    finished: bool = False
    """Whether all steps are done."""
    notes: tuple[str, ...] = ()
    """Lines to report, e.g. a changed config or damaged checkpoints."""
    changes: tuple[str, ...] = ()
    """The changes to what a step computes that `--allow-change` permits, one line per key."""
    allow_change: bool = False
    """Whether the run may continue with another config, other image files or other training rows than before: by
    `--allow-change`, now or at its checkpoint if no step has been saved since."""
    replaced: Path | None = None
    """Where `--overwrite` moves the previous run; it is deleted once its successor is ready to train."""

    @property
    def changed(self) -> bool:
        """Whether the run continues with a config that changes what a step computes."""
        return bool(self.changes)


def decide_start(run: RunConfig, state: FolderState, flags: Flags = NO_FLAGS) -> Start:
    """Decide where a run starts. Reads and writes nothing.

    Raises:
        UserError: The start would mix or overwrite runs, or the folders cannot be written.
    """
    check_obstacles(run, state.obstacle, state.checkpoint_dir.obstacle)
    if flags.overwrite and not flags.restarted and state.has_config and not state.foreign:
        _refuse_foreign_checkpoints(run, state.checkpoint_dir, overwrite=True)
        return Start(replaced=run.folder.with_name(f".{run.folder.name}.replaced"))
    if not state.is_empty and not flags.restarted:
        _refuse_occupied(run, state)
    if state.error:
        raise state.error
    _refuse_foreign_checkpoints(run, state.checkpoint_dir)
    if state.checkpoint is None and state.damaged:
        pointer = run.folder / "latest"
        way_out = f"Restore one, write the name of another one into {pointer}, or --overwrite to start from scratch."
        raise none_whole(run.checkpoints, state.damaged, way_out)
    changes: list[Change] = []
    if state.checkpoint or state.has_metrics:
        if not state.has_config:
            raise UserError(f"{run.folder} has steps but no config.toml: restore it, or give another runner.name.")
        changes = find_changes(run, state.config, allow_change=flags.allow_change)
    if state.checkpoint is None or state.position is None:
        if state.checkpoint_dir.holds_checkpoints:  # They became visible only now, or no file says whose they are.
            raise UserError(
                f"{run.checkpoints} holds checkpoints, but none to continue from: the run would start from scratch "
                "beside them. Give another runner.name, or --overwrite to remove them."
            )
        return Start()
    start = _continue_from(run, state, state.checkpoint, state.position, changes)
    return replace(start, allow_change=flags.allow_change or state.changed_here)


def _continue_from(
    run: RunConfig, state: FolderState, checkpoint: Path, position: Position, changes: list[Change]
) -> Start:
    damage = _describe_damage(state.damaged, checkpoint)
    if _is_finished(run, position):
        return Start(position.step, checkpoint, finished=True, notes=tuple(damage))
    order = describe_order(changes, in_epoch=position.sample > 0)
    pointer = f"warning: {state.pointer}: continues from {checkpoint}, the newest one" if state.pointer else ""
    notes = (describe_changes(changes), order, pointer, *damage, *_describe_later(state.later, checkpoint))
    return Start(
        position.step,
        checkpoint,
        notes=tuple(note for note in notes if note),
        changes=tuple(lines_of([change for change in changes if not may_change(change[0])])),
    )


def check_obstacles(run: RunConfig, folder: str, checkpoints: str) -> None:
    """Raise `UserError` if the text for the run's folder or for its checkpoint folder is not empty."""
    if folder:
        raise UserError(
            f"runner.output_dir = {run.runner.output_dir!r} cannot hold the run {run.runner.name!r}: {folder}. "
            "Name another folder"
        )
    if checkpoints:
        raise UserError(
            f"runner.checkpoint_dir = {run.runner.checkpoint_dir!r} cannot hold the checkpoints of "
            f"{run.runner.name!r}: {checkpoints}. Name another folder"
        )


def _refuse_occupied(run: RunConfig, state: FolderState) -> None:
    if state.foreign:
        raise UserError(
            f"{run.folder} is not empty and holds no run: its {state.foreign} is not the config of one. Choose another "
            "runner.name or runner.output_dir, or move what is there."
        )
    if not state.has_config:
        raise UserError(f"{run.folder} is not empty and holds no run. Choose another runner.name or runner.output_dir.")
    if run.runner.resume == "never":
        raise UserError(
            f"{run.folder} already holds a run and runner.resume is 'never'. "
            "Give another runner.name, or --overwrite to remove it."
        )


def _refuse_foreign_checkpoints(run: RunConfig, there: CheckpointDir, *, overwrite: bool = False) -> None:
    """Two runs must not share a checkpoint folder, and a run must not lose its own when `checkpoint_dir` changes."""
    if not overwrite and there.wanted_before and not there.wanted_here:
        raise UserError(
            f"runner.checkpoint_dir has changed, and the checkpoints of {run.folder} are still in {there.before}: move "
            f"them to {run.checkpoints}, or set runner.checkpoint_dir as it was."
        )
    if not run.runner.checkpoint_dir:
        return
    refuse_other_owner(run, there.owner, there.run_owner)
    if there.owner is not None or not there.holds_checkpoints:
        return
    if not (there.wanted_here and not overwrite) and not there.is_before:
        raise UserError(
            f"{run.checkpoints} holds checkpoints of a run that is not in {run.folder}: give another runner.name or "
            "runner.checkpoint_dir, or remove that folder."
        )


def refuse_other_owner(run: RunConfig, owner: str | None, own: str) -> None:
    """Raise `UserError` if the checkpoint folder belongs to another run.

    Args:
        run: The run.
        owner: Content of the owner file in the checkpoint folder; None if it has none.
        own: Content of the owner file in the run's folder.
    """
    if owner is not None and owner != own:
        whose = owner.partition(" ")[2].strip()
        raise UserError(
            f"{run.checkpoints} is for the checkpoints of another run{f', which began in {whose}' if whose else ''}: "
            f"give another runner.name or runner.checkpoint_dir, or, if that run is gone, remove {run.checkpoints}."
        )


def say_finished(run: RunConfig, start: Start) -> str:
    """The message for a run that is already finished."""
    limits = "runner.max_steps, runner.max_epochs or runner.early_stop_patience"
    return f"{run.runner.name} is finished: its {start.step} steps are in {run.folder} (see {limits})."


def explain(error: UserError, start: Start) -> UserError:
    """The error of a run that cannot start; if its config has changed, the changes are added as the likely cause."""
    if not start.changed:
        return error
    lines = "\n".join(start.changes)
    return UserError(
        f"{error}\nThe cause may be a change to the run's config that --allow-change permits:\n{lines}\n"
        "Without the change the run can continue; to train with it, give another runner.name."
    )


def _is_finished(run: RunConfig, position: Position) -> bool:
    """Whether all steps are done; a finished run continues if its limit or patience is raised."""
    runner = run.runner
    if position.best.should_stop_early(runner.best_metric, runner.early_stop_patience):
        return True
    if runner.val_check_interval and position.validated < position.step:
        return False  # The last validation is still missing.
    return position.step >= runner.stop_step(position.rows // run.trainer.global_batch_size)


def _describe_damage(damaged: Mapping[str, str], used: Path) -> list[str]:
    notes = [f"warning: the checkpoint {name} is damaged: {why}" for name, why in sorted(damaged.items(), reverse=True)]
    return [*notes, f"warning: continues from {used}, the newest undamaged one"] if notes else []


def _describe_later(later: tuple[str, ...], used: Path) -> list[str]:
    """Warn which later checkpoints will be set aside when a run continues from an earlier one."""
    gone = f"later checkpoints are set aside when the next one is complete: {', '.join(later)}"
    return [f"warning: continues from {used}; {gone}"] if later else []


MAY_CHANGE = frozenset(
    {
        *("cluster", "loggers", "data.num_workers", "data.cache_dir", "data.download_limit_gb"),
        *("data.on_bad_sample", "data.max_bad_samples"),
        *("runner.max_steps", "runner.max_epochs", "runner.save_interval", "runner.keep_last", "runner.save_best"),
        *("runner.keep_every", "runner.async_save", "runner.checkpoint_dir", "runner.checkpoint_rename"),
        *("runner.val_check_interval", "runner.val_samples", "runner.val_at_start", "runner.best_metric"),
        *("runner.early_stop_patience", "runner.early_stop_min_delta"),
        *("runner.resume", "runner.output_dir", "runner.loggers", "runner.evaluators", "evaluators"),
        *("runner.max_skipped_steps", "runner.spike_threshold", "runner.profile", "trainer.timeout_seconds"),
        *("trainer.device", "trainer.micro_batch_size", "trainer.min_unit_size", "trainer.num_replicas"),
        *("trainer.reshard_after_forward", "trainer.reduce_every_micro_batch", "trainer.activation_checkpointing"),
        *("trainer.compile", "trainer.cpu_offload", "trainer.ema_device"),
    }
)
"""Keys and tables that may differ when a run continues: they change a step's result by rounding at most."""

CHANGE_ORDER = (
    *("seed", "data.shuffle", "data.streams", "data.stream_of", "data.chunk_frames", "data.shuffle_buffer"),
    "data.mixture",
)
"""Keys and tables that change the order of an epoch's samples."""

Change = tuple[str, object, object]
"""A key, its previous value, and its current value."""


def find_changes(run: RunConfig, saved: Mapping[str, Any], *, allow_change: bool) -> list[Change]:
    """Find what differs from the config that the run was trained with so far.

    Args:
        run: The run.
        saved: The content of its saved config.
        allow_change: Whether changes to what a step computes are permitted.

    Raises:
        UserError: A change affects what a step computes, and `allow_change` is False.
    """
    chosen = run.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
    current = read_toml(dump_config(run))
    counted = {dotted(path) for path, _ in leaves(chosen)}
    counted |= {dotted(path) for path, _ in leaves(current) if _in_new_entry(path, saved, chosen)}
    changes = [
        (key, before, after)
        for key, before, after in diff_tables(_with_optim_names(saved), current)
        if before is not None or key in counted  # Else a key of a later version, with the default that changes nothing.
    ]
    if not allow_change and any(not may_change(key) for key, _, _ in changes):
        lines = "\n".join(lines_of(changes))
        raise UserError(
            f"{run.folder} holds a run with another config:\n{lines}\n"
            "Continue it with its own config, give another runner.name, --allow-change to continue from its last "
            "checkpoint with this config, or --overwrite to remove it and start from scratch."
        )
    return changes


def _in_new_entry(path: tuple[str | int, ...], saved: Mapping[str, Any], chosen: Mapping[str, Any]) -> bool:
    """Whether a key is in an entry of a list, such as the second of `[[data.mixture]]`, that was added to the run's
    config: then it is a change even with its default.
    """
    entries = (path[: place + 1] for place, part in enumerate(path) if isinstance(part, int))
    return any(_has(chosen, entry) and not _has(saved, entry) for entry in entries)


def _has(table: Any, path: tuple[str | int, ...]) -> bool:
    try:
        functools.reduce(operator.getitem, path, table)
    except (KeyError, IndexError, TypeError):
        return False
    return True


def _with_optim_names(saved: Mapping[str, Any]) -> dict[str, Any]:
    """The saved config with the names of optimizer and schedule, which early versions did not write."""
    defaults = {"type": OptimConfig().type, "schedule": OptimConfig().schedule}
    return {**saved, "optim": {**defaults, **saved.get("optim", {})}}


def may_change(key: str) -> bool:
    """Whether a key may change without `--allow-change`."""
    key = re.sub(r"^data\.mixture\.\d+\.", "data.", key)
    return bool({key, key.split(".")[0]} & MAY_CHANGE)


def describe_changes(changes: list[Change]) -> str:
    """The changes as a note: a heading and one line per change; empty if there are none."""
    return "\n".join(["goes on with another config:", *lines_of(changes)]) if changes else ""


def describe_order(changes: list[Change], *, in_epoch: bool) -> str:
    """A warning if the order of samples changes in the middle of an epoch (`in_epoch`), else empty."""
    keys = [key for key, _, _ in changes if key.startswith(CHANGE_ORDER)]
    if not keys or not in_epoch:
        return ""
    return (
        f"warning: {', '.join(keys)}: the order of samples changes in the middle of an epoch: some of its rows will "
        "be used twice and some not at all"
    )


def lines_of(changes: list[Change]) -> list[str]:
    """One line per change."""
    return [
        f"  {key}: {before!r} -> {after!r}{'' if may_change(key) else ' (changes what a step computes)'}"
        for key, before, after in changes
    ]
