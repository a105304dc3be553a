"""Load a checkpoint into a run on any number of ranks; a checkpoint that does not match the run is refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from rlinf_core.errors import UserError
from rlinf_core.torch_names import read_shards
from rlinf_core.training.checkpoint.shards import ShardReader
from rlinf_core.training.checkpoint.state import Position, read_state

LISTED = 4
"""Maximum number of parameters that a message lists."""


def load(
    path: Path, tensors: Mapping[str, torch.Tensor], here: Position, *, allow_other_rows: bool = False
) -> Position:
    """Load a checkpoint into the given tensors, on any number of ranks; called on every rank.

    Args:
        path: The checkpoint.
        tensors: The tensors to fill, by name.
        here: The position that this run would have at the same step.
        allow_other_rows: Continue on other rows than those that the checkpoint was trained on.

    Raises:
        UserError: The checkpoint belongs to another model, or its position to other data.
    """
    position = read_state(path).position
    if position.rows != here.rows and not allow_other_rows:
        raise UserError(
            f"{path} was saved while training on {position.rows} rows, but the training split now has {here.rows}: "
            "the dataset has changed. Restore the dataset, continue on the rows of now with the statistics of before "
            "(--allow-change), or use another runner.name."
        )
    if position.data and here.data and position.data != here.data and not allow_other_rows:
        raise UserError(
            f"{path} was saved while training on other rows than the training split now has: the dataset, or how "
            "samples are made from it, has changed. Restore it, continue with --allow-change, or use another "
            "runner.name."
        )
    if changed := position.other_layout(here):
        raise UserError(
            f"{path} was saved by a model for other data: {changed}. Restore the dataset and the policy's files, or "
            "use another runner.name."
        )
    reader = ShardReader(path)
    if position.layout != here.layout:
        shapes = {name: tuple(t.shape) for name, t in tensors.items() if name.startswith("model.")}
        raise UserError(
            f"{path} was saved by a model of another layout ({position.layout}; this one is {here.layout}): "
            f"{layout_difference(reader, position, shapes)}. Restore what differs, or use another runner.name."
        )
    moved = (position.epoch, position.sample) != (here.epoch, here.sample)
    if moved and not (allow_other_rows and position.rows != here.rows):
        raise UserError(
            f"{path} is at sample {position.sample} of epoch {position.epoch}, but with this "
            f"trainer.global_batch_size step {position.step} ends at sample {here.sample} of epoch {here.epoch}: "
            "samples would be skipped or repeated. Keep the batch size, or use another runner.name."
        )
    missing = sorted(set(tensors) - set(reader.read_metadata().state_dict_metadata))
    if missing:
        raise UserError(
            f"{path} does not hold {missing[0]}{f' and {len(missing) - 1} more' * (len(missing) > 1)}, which this "
            "config trains or averages: optim.type, optim.ema_decay, or what the policy freezes, has changed. Restore "
            "the config, or use another runner.name."
        )
    read_shards(dict(tensors), storage_reader=reader)
    return position


def layout_difference(reader: ShardReader, position: Position, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """How the parameters of a checkpoint differ from those of a model, and what may be the cause.

    Args:
        reader: The checkpoint.
        position: Its position, which records the adapters that plugins had added.
        shapes: The model's parameters, each prefixed with `model.` as in checkpoints.
    """
    saved = {
        name: tuple(getattr(entry, "size", ()))
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if name.startswith("model.")
    }
    different = [name for name in saved if name in shapes and saved[name] != shapes[name]]
    gone, new = sorted(saved.keys() - shapes.keys()), sorted(shapes.keys() - saved.keys())
    found = (("has parameters that this one lacks", gone), ("lacks", new), ("has other shapes of", different))
    texts = [f"it {what}: {_first(names)}" for what, names in found if names]
    if gone and position.adapters:
        added = ", ".join(f"{count} of {name}" for name, count in position.adapters.items())
        texts.append(f"it recorded parameters of adapters ({added}), which a plugin that is not active now had added")
    else:
        texts.append("the policy's sizes, its plugin's version or the plugins that change it differ")
    return "; ".join(texts)


def _first(names: Sequence[str]) -> str:
    shown = ", ".join(name.removeprefix("model.") for name in names[:LISTED])
    return shown + f" and {len(names) - LISTED} more" * (len(names) > LISTED)
