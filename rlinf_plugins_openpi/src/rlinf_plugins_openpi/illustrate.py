"""What `rlinf inspect` shows of π0 and π0.5: images as a training step changes them, tokens, masks.

Images are changed by the model's own code, in torch, which is imported only where there is something to change.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import numpy as np

from rlinf_core.illustration import Camera, Grid, Illustration, Picture, Token, TokenText
from rlinf_plugins_openpi.inputs.tokenizer import clean, find_tokenizer, load_processor
from rlinf_plugins_openpi.inputs.transforms import CAMERAS, OpenpiSample

if TYPE_CHECKING:
    from rlinf_plugins_openpi.config import OpenpiPolicyConfig

Draws = Mapping[str, Mapping[str, Any]]
FORMAT, TASK, STATE = "format", "task", "state"
"""Kinds of tokens."""


def illustrate(policy: OpenpiPolicyConfig, sample: OpenpiSample, draws: Draws) -> Illustration:
    """See `PolicyConfig.illustrate`."""
    return Illustration(
        cameras=tuple(_cameras(policy, sample, draws)),
        texts=(_prompt(policy, sample),),
        grids=(_camera_mask(sample), _token_mask(sample), *_action_masks(policy, sample)),
    )


def _cameras(policy: OpenpiPolicyConfig, sample: OpenpiSample, draws: Draws) -> Iterator[Camera]:
    present = [name for name in CAMERAS if name in sample.get("images", {})]
    changed = _augmented(sample, draws) if policy.augment and present and draws else {}
    note = "" if policy.augment else "policy.augment is off: training sees the same image each time."
    for name in CAMERAS:
        if name in present:
            yield Camera(name, tuple(changed.get(name, ())), note)
        else:
            yield Camera(name, note="The data have no such camera: it is masked, the model does not read it.")


def _augmented(sample: OpenpiSample, draws: Draws) -> dict[str, list[Picture]]:
    """Camera -> the images that the steps see in which the run meets the sample."""
    import torch

    from rlinf_plugins_openpi.inputs.collate import stack
    from rlinf_plugins_openpi.model.augment import augment

    batch = stack([{**sample, **drawn} for drawn in draws.values()])
    changed = augment(batch["images"], batch["crop_and_rotation"], batch["color_jitter"])
    pixels = ((changed + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).numpy()
    pictures: dict[str, list[Picture]] = {}
    for column, name in enumerate(name for name in CAMERAS if name in sample["images"]):
        for row, (when, drawn) in enumerate(draws.items()):
            pictures.setdefault(name, []).append(Picture(f"{when}: {_change(name, drawn)}", pixels[row, column]))
    return pictures


def _change(camera: str, drawn: Mapping[str, Any]) -> str:
    """What the random numbers do to an image of a camera, in words."""
    on_wrist = "wrist" in camera
    parts = []
    if not on_wrist:
        down, right, angle = drawn["crop_and_rotation"]
        parts.append(f"crop {down:+.1f}, {right:+.1f} px, turned {math.degrees(angle):+.1f}°")
    applied, brightness, contrast, turn = drawn["color_jitter"][int(on_wrist)]
    if applied:
        parts.append(f"brightness {brightness:+.2f}, contrast {contrast:+.2f}, hue {turn * 360:+.0f}°")
    return "; ".join(parts) or "unchanged"


def _prompt(policy: OpenpiPolicyConfig, sample: OpenpiSample) -> TokenText:
    processor = load_processor(find_tokenizer(policy.tokenizer))
    ids = sample["tokens"][sample["token_mask"]].tolist()
    kinds = _kinds(processor, clean(sample["prompt"]), ids, discrete_state=policy.discrete_state_input)
    pieces = [_visible(processor.id_to_piece(id)) for id in ids]
    whole, most = sample["prompt_length"], policy.max_token_len
    note = f"The prompt has {whole} tokens; policy.max_token_len = {most}."
    if STATE in kinds:
        note += " The state stands in the text, each number in one of 256 bins over [-1, 1] of its normalised value."
    return TokenText("Prompt", tuple(map(Token, ids, pieces, kinds)), max(0, whole - most), note)


def _kinds(processor: Any, task: str, ids: Sequence[int], *, discrete_state: bool) -> list[str]:
    """What each token of a prompt belongs to; see `tokenizer` for the two formats."""

    def reach(text: str) -> int:
        """How many tokens of the prompt, <bos> included, are those of its beginning `text`."""
        pairs = zip(processor.encode(text), ids[1:], strict=False)
        return 1 + sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))

    if not discrete_state:
        stop = reach(task)
        return [FORMAT if place == 0 or place >= stop else TASK for place in range(len(ids))]
    first, last, state = reach("Task:"), reach(f"Task: {task}"), reach(f"Task: {task}, State:")
    end = next((place for place in range(state, len(ids)) if ";" in processor.id_to_piece(ids[place])), len(ids))
    return [TASK if first <= place < last else STATE if state <= place < end else FORMAT for place in range(len(ids))]


def _visible(piece: str) -> str:
    """A piece of the vocabulary; of those that stand for a byte, its character if it has one."""
    byte = re.fullmatch(r"<0x([0-9A-F]{2})>", piece)
    character = chr(int(byte[1], 16)) if byte else piece
    return "↵" if character == "\n" else character if character.isascii() and character.isprintable() else piece


def _camera_mask(sample: OpenpiSample) -> Grid:
    read = [int(name not in sample.get("images", {})) for name in CAMERAS]
    return Grid("Camera mask", np.array([read]), ("read", "masked"), columns=", ".join(CAMERAS))


def _token_mask(sample: OpenpiSample) -> Grid:
    mask = sample["token_mask"]
    return Grid(
        "Token mask", (~mask[None]).astype(np.int64), ("read", "filled up, masked"), columns=f"{len(mask)} tokens"
    )


def _action_masks(policy: OpenpiPolicyConfig, sample: OpenpiSample) -> Iterator[Grid]:
    """Which numbers of the target are the robot's, and which of them count."""
    if "actions" not in sample:
        return
    steps, width = sample["actions"].shape
    values = np.zeros((width, steps), np.int64)
    values[:, sample.get("actions_is_pad", np.zeros(steps, np.bool_))] = 1
    values[sample.get("action_width", width) :] = 2
    names = (
        "the robot's, in the loss",
        f"past the end of the episode: {_counted(policy.mask_padded_steps, 'mask_padded_steps')}",
        f"zeros up to policy.action_dim: {_counted(policy.mask_padded_dims, 'mask_padded_dims')}",
    )
    yield Grid("Action mask", values, names, rows=f"{width} numbers", columns=f"{steps} steps")


def _counted(left_out: bool, key: str) -> str:
    return f"left out of the loss (policy.{key})" if left_out else "in the loss, too"
