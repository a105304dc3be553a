"""The images of a batch as the model takes them: pixels, positions, and which tokens see one another.

Axes: B samples, T tokens, I images, E entries of `pixel_values` (patches, tiles or images, as the architecture has it).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlinf_core import UserError
from rlinf_plugins_text.vision.processor import BLANK, Vision

KEY = "images"
"""Key below a batch's `packing`."""


def blank_tokens(vision: Vision) -> NDArray[np.int32]:
    """The tokens of a text that is one blank image, which batches without images get.

    The ranks of a run gather the vision tower together, so that all must call it equally often.
    """
    return np.full(_blank_length(vision), vision.token, np.int32)


def blank_image() -> NDArray[np.uint8]:
    """The pixels of a blank image."""
    return np.zeros((BLANK, BLANK, 3), np.uint8)


@functools.lru_cache(maxsize=4)
def _blank_length(vision: Vision) -> int:
    return int(image_tokens(vision, vision.inputs([blank_image()])).sum())


def image_tokens(vision: Vision, inputs: Mapping[str, Tensor]) -> Tensor:
    """Number of tokens that stand for each image, int64 [I], from the processor's outputs."""
    if vision.entry_tokens:
        return inputs["entries"] * vision.entry_tokens
    return inputs["image_grid_thw"].prod(-1) // _merged(vision.table)


@functools.lru_cache(maxsize=4)
def _merged(table: str) -> int:
    """Patches that become one token."""
    vision = json.loads(table).get("vision_config") or {}
    return int(vision.get("spatial_merge_size", 2)) ** 2


def add_images(
    batch: Mapping[str, Any], vision: Vision, images: Sequence[NDArray[np.uint8]], documents: Sequence[tuple[int, int]]
) -> dict[str, Any]:
    """A batch with the images of its texts.

    Args:
        batch: From `rows.collate.stack`.
        vision: The model's.
        images: uint8 [height, width, 3], in the order of the batch's tokens.
        documents: The sample of each image, and the number of its text there.

    Returns:
        The batch with `packing.images`: the processor's outputs [E, ...] or [I, ...]; `entries` int64 [I]; `documents`
        int64 [I, 2]; `ends` int64 [I], the index after an image's last token in its sample. `positions` become int64
        [B, 3, T] for models with positions in time, height and width; `token_types` int64 [B, T] says which tokens see
        one another, for models that need it.

    Raises:
        UserError: A text has another number of tokens for an image than the processor makes.
    """
    inputs = vision.inputs(images)
    found = image_tokens(vision, inputs)
    is_image = batch["tokens"] == vision.token
    if int(is_image.sum()) != int(found.sum()):
        raise UserError(
            f"the texts of a batch have {int(is_image.sum())} tokens for images, but {len(images)} images make "
            f"{int(found.sum())}: policy.config or the processor has changed since the texts were tokenized, or a text "
            "contains the token itself"
        )
    result = dict(batch)
    placed = torch.tensor(list(documents), dtype=torch.int64).reshape(-1, 2)
    # Images are in the order of their tokens, so that the n-th ends where that many tokens of images have passed.
    ends = is_image.nonzero()[found.cumsum(0) - 1, 1] + 1
    result["packing"] = {**batch["packing"], KEY: {**inputs, "documents": placed, "ends": ends}}
    if vision.family.grid_positions:
        result["positions"] = _grid_positions(batch, vision, inputs["image_grid_thw"], placed, is_image)
    if vision.family.attention == "image_blocks":
        result["token_types"] = is_image.long()
    if vision.family.attention == "prefix":
        result["token_types"] = _after_prefix(batch)
    return result


def _after_prefix(batch: Mapping[str, Any]) -> Tensor:
    """Int64 [B, T]: 0 before the first trained token, which is the prefix, and 1 from it on, padding included."""
    trained: Tensor = batch["trained"]
    types = (trained.long().cumsum(1) > 0).long()
    # A text without a trained token is a blank image, all of it prefix; its padding is not.
    real = torch.arange(trained.shape[1]) < trained.shape[1] - batch["document_lengths"][:, -1:]
    after: Tensor = torch.where(real, types, 1)
    return after


def _grid_positions(
    batch: Mapping[str, Any], vision: Vision, grids: Tensor, documents: Tensor, is_image: Tensor
) -> Tensor:
    """Positions in time, height and width, int64 [B, 3, T], by the model's own rule, counted from 0 in each text."""
    positions: Tensor = batch["positions"][:, None].repeat(1, 3, 1)
    model = _rule(vision.table)
    for row, number in dict.fromkeys(map(tuple, documents.tolist())):
        lengths = batch["document_lengths"][row]
        begin = int(lengths[:number].sum())
        part = slice(begin, begin + int(lengths[number]))
        own = grids[(documents == torch.tensor([row, number])).all(1)]
        found, _ = model.get_rope_index(
            batch["tokens"][row, part][None], is_image[row, part][None].int(), image_grid_thw=own
        )
        positions[row, :, part] = found[:, 0]
    return positions


@functools.lru_cache(maxsize=4)
def _rule(table: str) -> Any:
    """A model of the architecture without parameters, whose `get_rope_index` reads nothing but the config."""
    from transformers import AutoModel

    config = _config(json.loads(table))
    mapping: Any = AutoModel._model_mapping
    cls: Any = mapping[type(config)]
    model = cls.__new__(cls)
    model.__dict__["config"] = config
    return model


def _config(table: Mapping[str, Any]) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(**table)
