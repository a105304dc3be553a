"""From samples to a batch of tensors. Runs in loader workers.

Axes: B samples, T tokens, M texts of the sample that has most, plus one for padding; T and M are rounded up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rlinf_plugins_text.rows.samples import TextSample
from rlinf_plugins_text.vision.processor import Vision

TOKEN_STEP, TEXT_STEP = 64, 8
"""T and M are rounded up to multiples of these, so that compiled code sees few shapes."""


def stack(samples: Sequence[TextSample], *, max_length: int, fixed: bool) -> dict[str, Any]:
    """Stack samples.

    Args:
        samples: Encoded samples.
        max_length: Maximum number of tokens in a sample.
        fixed: Whether T is always `max_length`, instead of the longest sample rounded up.

    Returns:
        `tokens` and `positions` int64 [B, T], positions counting from 0 in each text; `trained` bool [B, T];
        `document_lengths` int32 [B, M]: the sample's texts, then zeros, and the length of the padding in the last
        column; `packing`: `predicting`, int64 [number of trained tokens], the positions before trained tokens, among
        B·T.
    """
    longest = max(len(sample["tokens"]) for sample in samples)
    length = max_length if fixed else min(_rounded(longest, TOKEN_STEP), max_length)
    texts = _rounded(max(len(sample["document_lengths"]) for sample in samples) + 1, TEXT_STEP)
    tokens = np.zeros((len(samples), length), np.int64)
    positions = np.zeros((len(samples), length), np.int64)
    trained = np.zeros((len(samples), length), np.bool_)
    documents = np.zeros((len(samples), texts), np.int32)
    for row, sample in enumerate(samples):
        own, size = sample["document_lengths"], len(sample["tokens"])
        tokens[row, :size] = sample["tokens"]
        trained[row, :size] = sample["trained"]
        documents[row, : len(own)] = own
        documents[row, -1] = length - size
        every = [*own.tolist(), length - size]
        positions[row] = np.concatenate([np.arange(one) for one in every])
    # Found here, not from the mask on the device: there the host would wait for their number.
    predicting = np.flatnonzero(np.pad(trained[:, 1:], ((0, 0), (0, 1))))
    return {
        "tokens": torch.from_numpy(tokens),
        "positions": torch.from_numpy(positions),
        "trained": torch.from_numpy(trained),
        "document_lengths": torch.from_numpy(documents),
        "packing": {"predicting": torch.from_numpy(predicting)},
    }


def stack_with_images(samples: Sequence[TextSample], vision: Vision, *, max_length: int, fixed: bool) -> dict[str, Any]:
    """Stack samples of a model that sees images; see `stack` and `vision.batch.add_images`.

    A batch without images gets one more sample: a blank image, of which nothing is trained.
    """
    from rlinf_plugins_text.vision.batch import add_images, blank_image, blank_tokens

    images = [image for sample in samples for image in sample.get("images", {}).values()]
    documents = [
        (row, int(document)) for row, sample in enumerate(samples) for document in sample.get("image_documents", ())
    ]
    if not images:
        samples = [*samples, _untrained(blank_tokens(vision))]
        images, documents = [blank_image()], [(len(samples) - 1, 0)]
        max_length = max(max_length, len(samples[-1]["tokens"]))
    return add_images(stack(samples, max_length=max_length, fixed=fixed), vision, images, documents)


def _untrained(tokens: NDArray[np.int32]) -> TextSample:
    return TextSample(
        tokens=tokens,
        trained=np.zeros(len(tokens), np.bool_),
        document_lengths=np.array([len(tokens)], np.int32),
        full_lengths=np.array([len(tokens)], np.int64),
        left_out="",
    )


def _rounded(number: int, step: int) -> int:
    return -(-number // step) * step
