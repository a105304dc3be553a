"""Checkpoints of a run: written whole or not at all, kept in `<run>/checkpoints/step_000002000/`.

A checkpoint holds the shards that `torch.distributed.checkpoint` writes, under the module's own parameter names, and
`state.json`: step, position in the data, and a tag of the layout. Because every random draw is keyed by (seed, epoch,
position), the position is also the state of all random generators. The file `latest` names the newest complete one.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.distributed.checkpoint.state_dict_loader import load as read_shards
from torch.distributed.checkpoint.state_dict_saver import save as write_shards

from rlinf_core.errors import UserError
from rlinf_core.files import write_text
from rlinf_core.training.distributed import Processes

FORMAT = 1


@dataclass(frozen=True)
class Position:
    """Where in the run a checkpoint stands."""

    step: int
    """Finished optimizer steps."""
    epoch: int
    """Passes over the data that are complete."""
    sample: int
    """Samples of the current epoch that were consumed, over all ranks."""
    rows: int
    """Rows of the training split; with another number the order would be another."""
    seed: int
    """The run's seed; with epoch and sample it determines every further draw."""
    layout: str
    """Tag of parameter names and shapes."""
    format: int = FORMAT


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None."""
    pointer = folder / "latest"
    if not pointer.exists():
        return None
    path = folder / "checkpoints" / pointer.read_text().strip()
    if not (path / "state.json").exists():
        raise UserError(
            f"{pointer} names {path.name}, which is not in {path.parent}. Restore it, write "
            f"the name of another one into {pointer.name}, or --overwrite to start afresh."
        )
    return path


def read_position(path: Path) -> Position:
    """The position of a checkpoint."""
    try:
        state = json.loads((path / "state.json").read_text())
        if state["format"] != FORMAT:
            raise UserError(f"{path} has checkpoint format {state['format']}; this version reads {FORMAT}.")
        return Position(**state)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{path / 'state.json'} is damaged ({error}). Write the name of another checkpoint into "
            f"{path.parents[1] / 'latest'}, or --overwrite to start afresh."
        ) from error


def save(
    folder: Path, position: Position, tensors: Mapping[str, torch.Tensor], group: Processes, keep_last: int
) -> Path:
    """Save a checkpoint; called on every rank.

    Returns:
        The folder of the complete checkpoint.
    """
    name = f"step_{position.step:09d}"
    path, aside = folder / "checkpoints" / name, folder / "checkpoints" / f".{name}.tmp"
    if group.rank == 0:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    group.wait()
    write_shards(dict(tensors), checkpoint_id=aside)
    if group.rank == 0:
        write_text(aside / "state.json", json.dumps(asdict(position), indent=1))
        if path.exists():
            shutil.rmtree(path)
        aside.rename(path)
        write_text(folder / "latest", name)
        for unfinished in folder.glob("checkpoints/.step_*.tmp"):
            shutil.rmtree(unfinished)
        # Later ones, left by somebody who set `latest` back, are not this run's to remove.
        complete = sorted(old for old in folder.glob("checkpoints/step_*") if old.name <= name)
        for old in complete[:-keep_last]:
            shutil.rmtree(old)
    group.wait()
    return path


def load(path: Path, tensors: Mapping[str, torch.Tensor], *, layout: str, rows: int) -> Position:
    """Load a checkpoint into the given tensors, on any number of ranks; called on every rank.

    Raises:
        UserError: If the checkpoint is of another model, or its position is one in other data.
    """
    position = read_position(path)
    if position.rows != rows:
        raise UserError(
            f"{path} was saved while training on {position.rows} rows, but the training split now has {rows}: "
            "the dataset has changed, so the run cannot go on where it was. Restore the dataset, or use another "
            "runner.name."
        )
    if position.layout != layout:
        raise UserError(
            f"{path} was saved by a model of another layout ({position.layout}; this one is {layout}): "
            "the policy's sizes or the version of its plugin differ."
        )
    read_shards(dict(tensors), checkpoint_id=path)
    return position
