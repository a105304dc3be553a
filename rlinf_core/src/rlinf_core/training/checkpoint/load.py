"""Load a checkpoint into a run on any number of ranks; a checkpoint that does not match the run is refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from rlinf_core.errors import UserError
from rlinf_core.torch_names import read_shards
from rlinf_core.training.checkpoint.shards import ShardReader
from rlinf_core.training.checkpoint.state import Position, read_state


def load(path: Path, tensors: Mapping[str, torch.Tensor], here: Position) -> Position:
    """Load a checkpoint into the given tensors, on any number of ranks; called on every rank.

    Args:
        path: The checkpoint.
        tensors: The tensors to fill, by name.
        here: The position that this run would have at the same step.

    Raises:
        UserError: The checkpoint belongs to another model, or its position to other data.
    """
    position = read_state(path).position
    if position.rows != here.rows:
        raise UserError(
            f"{path} was saved while training on {position.rows} rows, but the training split now has {here.rows}: "
            "the dataset has changed, so the run cannot continue. Restore the dataset, or use another "
            "runner.name."
        )
    if position.data and here.data and position.data != here.data:
        raise UserError(
            f"{path} was saved while training on other rows than the training split now has: the dataset, or how "
            "samples are made from it, has changed, so the run cannot continue. Restore it, or use another runner.name."
        )
    if changed := position.other_layout(here):
        raise UserError(
            f"{path} was saved by a model for other data: {changed}. Restore the dataset and the policy's files, or "
            "use another runner.name."
        )
    if position.layout != here.layout:
        raise UserError(
            f"{path} was saved by a model of another layout ({position.layout}; this one is {here.layout}): "
            "the policy's sizes or the version of its plugin differ. Restore them, or use another runner.name."
        )
    if (position.epoch, position.sample) != (here.epoch, here.sample):
        raise UserError(
            f"{path} is at sample {position.sample} of epoch {position.epoch}, but with this "
            f"trainer.global_batch_size step {position.step} ends at sample {here.sample} of epoch {here.epoch}: "
            "samples would be skipped or repeated. Keep the batch size, or use another runner.name."
        )
    reader = ShardReader(path)
    missing = sorted(set(tensors) - set(reader.read_metadata().state_dict_metadata))
    if missing:
        raise UserError(
            f"{path} does not hold {missing[0]}{f' and {len(missing) - 1} more' * (len(missing) > 1)}, which this "
            "config trains or averages: optim.type, optim.ema_decay, or what the policy freezes, has changed. Restore "
            "the config, or use another runner.name."
        )
    read_shards(dict(tensors), storage_reader=reader)
    return position
