"""What differs between a run's config so far and the one that it is to go on with, and what may. Torch-free."""

from __future__ import annotations

from pathlib import Path

from rlinf_core.config.load import diff_tables, dump_config, read_toml
from rlinf_core.contract.run import RunConfig
from rlinf_core.errors import UserError

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
