"""Where a run starts: afresh, from its last checkpoint, or not at all because it is finished (contract 9)."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rlinf_core.config.load import diff_tables, dump_config, read_toml
from rlinf_core.contract.run import RunConfig
from rlinf_core.errors import UserError
from rlinf_core.files import write_text, writing
from rlinf_core.training.agents import remember
from rlinf_core.training.checkpoint.state import NAMES, Position, find_damage, newest_whole, step_name
from rlinf_core.training.ownership import claim, refuse_foreign
from rlinf_core.training.run_folder import cannot_hold, check_folder

if TYPE_CHECKING:
    from rlinf_core.training.distributed.processes import Processes


@dataclass(frozen=True)
class Start:
    """Where a run starts."""

    step: int = 0
    """Steps that are already done."""
    checkpoint: Path | None = None
    """The checkpoint to continue from; None: from the initial weights."""
    finished: bool = False
    """Nothing is left to do."""
    notes: tuple[str, ...] = ()
    """What to tell of it: another config, damaged checkpoints."""
    changes: tuple[str, ...] = ()
    """What changes of what a step computes, as `--allow-change` lets it; a line for each key."""
    replaced: Path | None = None
    """The run that `--overwrite` moved aside; it is removed once its successor is ready to train."""

    @property
    def changed(self) -> bool:
        """Whether the run goes on with a config that changes what a step computes."""
        return bool(self.changes)


def find_start(
    run: RunConfig, *, restarted: bool = False, allow_change: bool = False, damaged: Mapping[str, str] | None = None
) -> Start:
    """Where the run starts, from what is in its folder; touches nothing. Of checkpoints only sizes are checked.

    Args:
        run: The run.
        allow_change: Go on with a config that changes what a step computes.
        damaged: What is known to be wrong with which checkpoint; an earlier one is then taken.
        restarted: torchrun started the processes again after a failure, with the same arguments: what is there is this
            run's own, which `runner.resume = "never"` does not mean.

    Raises:
        UserError: If going on would mix two runs, or overwrite one, or if the folder is none that can be read.
    """
    folder, saved = run.folder, run.folder / "config.toml"
    try:
        holds_something = folder.exists() and any(folder.iterdir())
    except OSError as error:
        raise cannot_hold(run, str(error)) from error
    if holds_something and not restarted:
        if not saved.exists():
            raise UserError(f"{folder} is not empty and holds no run. Choose another runner.name or runner.output_dir.")
        if run.runner.resume == "never":
            raise UserError(
                f"{folder} already holds a run and runner.resume is 'never'. "
                "Give another runner.name, or --overwrite to remove it."
            )
    refuse_foreign(run)
    bad = dict(damaged or {})
    newest = newest_whole(folder, run.checkpoints, bad)
    metrics = folder / "metrics.jsonl"
    changes: list[Change] = []
    if newest or (metrics.exists() and metrics.stat().st_size):
        changes = find_changes(run, saved, allow_change=allow_change)
    if newest is None:
        return Start()
    checkpoint, position = newest
    damage = _describe_damage(bad, checkpoint)
    if _is_finished(run, position):
        return Start(position.step, checkpoint, finished=True, notes=tuple(damage))
    order = describe_order(changes, in_epoch=position.sample > 0)
    notes = (describe_changes(changes), order, *damage, *_describe_left(checkpoint))
    return Start(
        position.step,
        checkpoint,
        notes=tuple(note for note in notes if note),
        changes=tuple(lines_of([change for change in changes if not may_change(change[0])])),
    )


def agree_on_start(run: RunConfig, group: Processes, start: Start, *, allow_change: bool = False) -> Start:
    """Have every rank check its share of the checkpoint, and take an earlier one as long as it is damaged.

    Args:
        run: The run.
        group: All ranks.
        start: Where the run would start.
        allow_change: See `find_start`.

    Returns:
        Where it does start, on every rank.

    Raises:
        UserError: No checkpoint is whole.
    """
    damaged: dict[str, str] = {}
    while start.checkpoint is not None and not start.finished:
        mine = find_damage(start.checkpoint, rank=group.rank, ranks=group.size)
        found = [why for why in group.gather(mine) if why]
        if not found:
            break
        damaged[start.checkpoint.name] = found[0]
        start = group.decide(lambda: find_start(run, restarted=True, allow_change=allow_change, damaged=damaged))
    return start


def say_finished(run: RunConfig, start: Start) -> str:
    """What to tell who starts a finished run."""
    limits = "runner.max_steps, runner.max_epochs or runner.early_stop_patience"
    return f"{run.runner.name} is finished: its {start.step} steps are in {run.folder} (see {limits})."


def choose_start(run: RunConfig, *, overwrite: bool, restarted: bool = False, allow_change: bool = False) -> Start:
    """Decide where the run starts. Called on rank 0.

    Args:
        run: The run.
        overwrite: Move a run of this name aside and start afresh, unless restarted.
        restarted: See `find_start`.
        allow_change: See `find_start`.

    Raises:
        UserError: If going on would mix two runs, or overwrite one.
    """
    check_folder(run)
    if overwrite and not restarted and (run.folder / "config.toml").exists():
        refuse_foreign(run, overwrite=True)
        return Start(replaced=_move_aside(run.folder))
    return find_start(run, restarted=restarted, allow_change=allow_change)


def prepare_folder(run: RunConfig, *, overwrite: bool, restarted: bool = False) -> Start:
    """Choose where the run starts and leave its folder ready: all that a run of one process needs before it trains.

    Args:
        run: The run.
        overwrite: See `choose_start`.
        restarted: See `find_start`.
    """
    start = choose_start(run, overwrite=overwrite, restarted=restarted)
    if not start.finished:
        leave_ready(run, start)
    return start


def leave_ready(run: RunConfig, start: Start, agents: Set[str] = frozenset()) -> None:
    """Leave the folder ready for a run that starts there, with `config.toml` in it. Called on rank 0.

    A config that changes what a step computes is recorded by `confirm`: it may turn out that it cannot go on.

    Args:
        run: The run.
        start: Where it starts.
        agents: torchrun's that started it.

    Raises:
        UserError: It cannot be written to, or another run has taken the folder for its checkpoints.
    """
    with writing(run.folder, "Make room there, or name another runner.output_dir"):
        run.folder.mkdir(parents=True, exist_ok=True)
        if not start.changed:
            write_text(run.folder / "config.toml", dump_config(run))
        if start.checkpoint is not None:
            write_text(run.folder / "latest", start.checkpoint.name)
        remember(run.folder, agents)
    claim(run, start.replaced)


def explain(error: UserError, start: Start) -> UserError:
    """The error of a run that cannot begin; where its config has changed, with that as the likely cause."""
    if not start.changed:
        return error
    lines = "\n".join(start.changes)
    return UserError(
        f"{error}\nThe cause may be what --allow-change lets differ from the run's config so far:\n{lines}\n"
        "Without that the run goes on as it was; to train with it, give another runner.name."
    )


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
    if aside.exists() and not (folder / "latest").exists():
        shutil.rmtree(folder)  # Left by an --overwrite that was killed; what it replaced is still aside.
    else:
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
    return aside


def put_back(run: RunConfig, start: Start) -> None:
    """Undo `--overwrite`: the successor never came to train. Called on rank 0."""
    if start.replaced:
        shutil.rmtree(run.folder, ignore_errors=True)  # It may not even be there.
        start.replaced.rename(run.folder)


def confirm(run: RunConfig, start: Start) -> None:
    """The run is ready to train: what it replaces goes, and what it changes is recorded. Called on rank 0.

    The config that the steps before were made with stays beside the new one.
    """
    if start.changed:
        config = run.folder / "config.toml"
        before = config.with_name(f"config.{step_name(start.step)}.toml")
        if not before.exists():  # Else no step was made with what is there.
            write_text(before, config.read_text(encoding="utf-8"))
        write_text(config, dump_config(run))
    if start.replaced:
        shutil.rmtree(start.replaced)
        for left in (*run.checkpoints.glob(NAMES), *run.checkpoints.glob(f".{NAMES}.tmp")):
            shutil.rmtree(left)  # They lie elsewhere than in the folder that was moved.


def _describe_damage(damaged: Mapping[str, str], used: Path) -> list[str]:
    notes = [f"warning: the checkpoint {name} is damaged: {why}" for name, why in sorted(damaged.items(), reverse=True)]
    return [*notes, f"warning: goes on from {used}, the newest that is whole"] if notes else []


def _describe_left(used: Path) -> list[str]:
    """What becomes of later checkpoints where a run goes on from an earlier one."""
    later = sorted(path.name for path in used.parent.glob(NAMES) if path.name > used.name)
    gone = f"later checkpoints are removed when the next one is complete: {', '.join(later)}"
    return [f"warning: goes on from {used}; {gone}"] if later else []


MAY_CHANGE = frozenset(
    {
        *("cluster", "data.num_workers", "data.cache_dir"),
        *("runner.max_steps", "runner.max_epochs", "runner.save_interval", "runner.keep_last", "runner.save_best"),
        *("runner.keep_every", "runner.async_save", "runner.checkpoint_dir", "runner.checkpoint_rename"),
        *("runner.val_check_interval", "runner.val_samples", "runner.best_metric"),
        *("runner.early_stop_patience", "runner.early_stop_min_delta"),
        *("runner.resume", "runner.output_dir", "runner.loggers"),
        *("runner.max_skipped_steps", "runner.spike_threshold", "runner.profile", "trainer.timeout_seconds"),
        *("trainer.device", "trainer.micro_batch_size", "trainer.min_unit_size", "trainer.num_replicas"),
        *("trainer.reshard_after_forward", "trainer.reduce_every_micro_batch", "trainer.activation_checkpointing"),
        *("trainer.compile", "trainer.cpu_offload", "trainer.ema_device"),
    }
)
"""Keys and tables that may differ when a run goes on: they change a step by no more than rounding."""

CHANGE_ORDER = ("seed", "data.shuffle", "data.streams", "data.chunk_frames", "data.shuffle_buffer", "data.mixture")
"""Keys and tables that change in which order the samples of an epoch come."""

Change = tuple[str, object, object]
"""A key, its value before, and its value now."""


def find_changes(run: RunConfig, saved: Path, *, allow_change: bool) -> list[Change]:
    """What differs from the config that the run was made with so far.

    Args:
        run: The run.
        saved: The config so far.
        allow_change: Whether what a step computes may differ.

    Raises:
        UserError: It does, and may not.
    """
    changes = diff_tables(read_toml(saved), read_toml(dump_config(run)))
    if not allow_change and any(not may_change(key) for key, _, _ in changes):
        lines = "\n".join(lines_of(changes))
        raise UserError(
            f"{run.folder} holds a run with another config:\n{lines}\n"
            "Continue it with its own config, give another runner.name, --allow-change to go on with this one from "
            "where it stands, or --overwrite to remove it and start afresh."
        )
    return changes


def may_change(key: str) -> bool:
    """Whether a key may differ without `--allow-change`."""
    return bool({key, key.split(".")[0]} & MAY_CHANGE)


def describe_changes(changes: list[Change]) -> str:
    """What to tell of them: a line each below a heading; empty where there are none."""
    return "\n".join(["goes on with another config:", *lines_of(changes)]) if changes else ""


def describe_order(changes: list[Change], *, in_epoch: bool) -> str:
    """A warning where the order of samples changes while an epoch is under way (`in_epoch`); else empty."""
    keys = [key for key, _, _ in changes if key.startswith(CHANGE_ORDER)]
    if not keys or not in_epoch:
        return ""
    return (
        f"warning: {', '.join(keys)}: the order of samples changes in the middle of an epoch, of whose rows some will "
        "come twice and some not at all"
    )


def lines_of(changes: list[Change]) -> list[str]:
    """A line for each change."""
    return [
        f"  {key}: {before!r} -> {after!r}{'' if may_change(key) else ' (changes what a step computes)'}"
        for key, before, after in changes
    ]
