"""What `rlinf inspect` shows for π0 and π0.5: images as augmented for training, prompt tokens and masks.

Images are augmented by the model's own code in torch, which is imported only if there are images to augment.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import numpy as np

from rlinf_core.illustration import Camera, Grid, Illustration, Picture, Token, TokenText
from rlinf_plugins_openpi.inputs.augmentation import labelled
from rlinf_plugins_openpi.inputs.tokenizer import clean, find_tokenizer, load_processor
from rlinf_plugins_openpi.inputs.transforms import OpenpiSample
from rlinf_plugins_openpi.model.dimensions import CAMERAS
from rlinf_plugins_openpi.model.draws import AUGMENTATION

if TYPE_CHECKING:
    from rlinf_plugins_openpi.settings import OpenpiSettings

Draws = Mapping[str, Mapping[str, Any]]
FORMAT, TASK, STATE = "format", "task", "state"
"""What a token of the prompt belongs to."""


def illustrate(policy: OpenpiSettings, sample: OpenpiSample, draws: Draws) -> Illustration:
    """See `PolicyConfig.illustrate`."""
    return Illustration(
        cameras=tuple(_cameras(policy, sample, draws)),
        texts=(_prompt(policy, sample),),
        grids=(_camera_mask(sample), _token_mask(sample), *_action_masks(policy, sample)),
    )


def _cameras(policy: OpenpiSettings, sample: OpenpiSample, draws: Draws) -> Iterator[Camera]:
    present = [name for name in CAMERAS if name in sample.get("images", {})]
    changed = _augmented(policy, sample, draws) if policy.augment and present and draws else {}
    note = "" if policy.augment else "policy.augment is off: training sees the same image each time."
    for name in CAMERAS:
        if name in present:
            yield Camera(name, tuple(changed.get(name, ())), note)
        else:
            yield Camera(name, note="The data have no such camera: it is masked, and the model does not read it.")


def _augmented(policy: OpenpiSettings, sample: OpenpiSample, draws: Draws) -> dict[str, list[Picture]]:
    """Camera -> its image at each training step that uses the sample, after each augmentation."""
    import torch

    from rlinf_plugins_openpi.inputs.collate import stack
    from rlinf_plugins_openpi.model.augment import augment

    batch = stack([{**sample, **drawn} for drawn in draws.values()])
    augmentations = labelled(policy.active_augmentations)
    stages = []
    for count in range(1, len(augmentations) + 1):
        changed = augment(batch["images"], batch[AUGMENTATION], dict(list(augmentations.items())[:count]))
        stages.append(((changed + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).numpy())
    shown: dict[str, list[Picture]] = {}
    for column, name in enumerate(batch[AUGMENTATION]):
        for row, (when, drawn) in enumerate(draws.items()):
            for pixels, (label, augmentation) in zip(stages, augmentations.items(), strict=True):
                head = when if len(stages) == 1 else f"{when}, {label}"
                what = augmentation.describe(_own(drawn[AUGMENTATION], label, name), name)
                shown.setdefault(name, []).append(Picture(f"{head}: {what}" if what else head, pixels[row, column]))
    return shown


def _own(drawn: Mapping[str, Any], label: str, camera: str) -> dict[str, Any]:
    """The numbers of one augmentation and camera: name -> [...]."""
    parts = {key.rpartition(".")[::2]: numbers for key, numbers in drawn.items()}
    return {name: numbers[CAMERAS.index(camera)] for (whose, name), numbers in parts.items() if whose == label}


def _prompt(policy: OpenpiSettings, sample: OpenpiSample) -> TokenText:
    processor = load_processor(find_tokenizer(policy.tokenizer))
    ids = sample["tokens"][sample["token_mask"]].tolist()
    kinds = _kinds(processor, clean(sample["prompt"]), ids, discrete_state=policy.discrete_state_input)
    pieces = [_visible(processor.id_to_piece(id)) for id in ids]
    whole, most = sample["prompt_length"], policy.max_token_len
    note = f"The prompt has {whole} tokens; policy.max_token_len = {most}."
    if STATE in kinds:
        note += " The state is part of the text: each normalised number as one of 256 bins over [-1, 1]."
    return TokenText("Prompt", tuple(map(Token, ids, pieces, kinds)), max(0, whole - most), note)


def _kinds(processor: Any, task: str, ids: Sequence[int], *, discrete_state: bool) -> list[str]:
    """Classify each token of a prompt; see `tokenizer` for the two formats."""

    def reach(text: str) -> int:
        """How many tokens of the prompt, including <bos>, match those of its beginning `text`."""
        pairs = zip(processor.encode(text), ids[1:], strict=False)
        return 1 + sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))

    if not discrete_state:
        stop = reach(task)
        return [FORMAT if place == 0 or place >= stop else TASK for place in range(len(ids))]
    first, last, state = reach("Task:"), reach(f"Task: {task}"), reach(f"Task: {task}, State:")
    end = next((place for place in range(state, len(ids)) if ";" in processor.id_to_piece(ids[place])), len(ids))
    return [TASK if first <= place < last else STATE if state <= place < end else FORMAT for place in range(len(ids))]


def _visible(piece: str) -> str:
    """A piece of the vocabulary as text; a byte piece as its character if that is printable."""
    byte = re.fullmatch(r"<0x([0-9A-F]{2})>", piece)
    character = chr(int(byte[1], 16)) if byte else piece
    return "↵" if character == "\n" else character if character.isascii() and character.isprintable() else piece


def _camera_mask(sample: OpenpiSample) -> Grid:
    read = [int(name not in sample.get("images", {})) for name in CAMERAS]
    return Grid("Camera mask", np.array([read]), ("read", "masked"), columns=", ".join(CAMERAS))


def _token_mask(sample: OpenpiSample) -> Grid:
    mask = sample["token_mask"]
    return Grid(
        "Token mask", (~mask[None]).astype(np.int64), ("read", "padding, masked"), columns=f"{len(mask)} tokens"
    )


def _action_masks(policy: OpenpiSettings, sample: OpenpiSample) -> Iterator[Grid]:
    """Which numbers of the target are the robot's, and which are in the loss."""
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
