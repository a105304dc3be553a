"""Checkpoints of a run: written whole or not at all, kept in `<run>/checkpoints/step_000002000/`.

A checkpoint holds the shards that `torch.distributed.checkpoint` writes, under the module's own parameter names, and
`state.json`: step, position in the data, and a tag of the layout. Because every random draw is keyed by (seed, epoch,
position), the position is also the state of all random generators. The file `latest` names the newest complete one,
`best` the one with the best validation, where `runner.save_best` asks for it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch.distributed.checkpoint.state_dict_loader import load as read_shards
from torch.distributed.checkpoint.state_dict_saver import save as write_shards

from rlinf_core.errors import UserError
from rlinf_core.files import write_text
from rlinf_core.training.distributed import Processes
from rlinf_core.training.position import Position, read_position, step_name


def save(
    folder: Path,
    position: Position,
    tensors: Mapping[str, torch.Tensor],
    group: Processes,
    keep_last: int,
    *,
    best: str = "",
) -> Path:
    """Save a checkpoint; called on every rank.

    Args:
        folder: The run's.
        position: Where the run stands.
        tensors: What to save.
        group: All ranks.
        keep_last: How many of the newest checkpoints stay.
        best: The checkpoint that the file `best` shall name, which stays besides; empty: there is none.

    Returns:
        The folder of the complete checkpoint.
    """
    name = step_name(position.step)
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
        name_best(folder, best)
        write_text(folder / "latest", name)
        for unfinished in folder.glob("checkpoints/.step_*.tmp"):
            shutil.rmtree(unfinished)
        # Later ones, left by somebody who set `latest` back, are not this run's to remove.
        complete = sorted(old for old in folder.glob("checkpoints/step_*") if old.name <= name)
        for old in complete[:-keep_last]:
            if old.name != best:
                shutil.rmtree(old)
    group.wait()
    return path


def restate(folder: Path, position: Position, best: str) -> None:
    """Correct what the checkpoint of a position says of validations: one was made up for. Called on rank 0."""
    write_text(folder / "checkpoints" / step_name(position.step) / "state.json", json.dumps(asdict(position), indent=1))
    name_best(folder, best)


def name_best(folder: Path, best: str) -> None:
    """Make the file `best` name a checkpoint, if that is complete, or none."""
    if best and (folder / "checkpoints" / best / "state.json").exists():
        write_text(folder / "best", best)
    else:
        (folder / "best").unlink(missing_ok=True)


def load(path: Path, tensors: Mapping[str, torch.Tensor], *, layout: str, rows: int, data: str = "") -> Position:
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
    if position.data and data and position.data != data:
        raise UserError(
            f"{path} was saved while training on other rows than the training split now has: the dataset, or how "
            "samples are made of it, has changed, so the run cannot go on where it was. Restore it, or use another "
            "runner.name."
        )
    if position.layout != layout:
        raise UserError(
            f"{path} was saved by a model of another layout ({position.layout}; this one is {layout}): "
            "the policy's sizes or the version of its plugin differ."
        )
    read_shards(dict(tensors), checkpoint_id=path)
    return position
