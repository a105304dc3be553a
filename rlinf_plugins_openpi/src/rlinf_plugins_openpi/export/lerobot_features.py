"""What goes into and comes out of a policy under lerobot's names, and what lerobot has no place for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlinf_core import LeRobotDatasetConfig, UserError
from rlinf_core.data.transforms import (
    CheckState,
    Concatenate,
    RelativeActions,
    RelativeUnless,
    SliceActions,
    Transform,
)
from rlinf_plugins_openpi.inputs.tokenizer import GEMMA_ENTRIES, load_processor
from rlinf_plugins_openpi.inputs.transforms import CAMERAS, IMAGE_SIZE

if TYPE_CHECKING:
    from rlinf_core import DatasetConfig
    from rlinf_core.data.normalize import Stats
    from rlinf_plugins_openpi.config import OpenpiPolicyConfig

TOKENIZER = "google/paligemma-3b-pt-224"
"""The one that lerobot's policies take from the hub."""
STATE, ACTION = "observation.state", "action"
RELATIVE = (RelativeActions, RelativeUnless)


@dataclass(frozen=True)
class Features:
    """What goes in and out, under lerobot's names."""

    images: Mapping[str, str]
    """lerobot's name -> the dataset's column, in the order in which the model reads the cameras."""
    state_width: int
    """0: there is no state."""
    action_width: int
    relative: tuple[bool, ...]
    """[action_width], or empty if no number of the action is relative to the state."""
    notes: tuple[str, ...]
    """What whoever runs it has to do, as no file of lerobot's says it."""

    def of_input(self) -> dict[str, Any]:
        """Cameras, then the state."""
        # The model takes pictures of any size; the shape tells lerobot no more than that these are pictures.
        images = {name: {"type": "VISUAL", "shape": [3, IMAGE_SIZE, IMAGE_SIZE]} for name in self.images}
        return images | ({STATE: {"type": "STATE", "shape": [self.state_width]}} if self.state_width else {})

    def of_output(self) -> dict[str, Any]:
        """The action."""
        return {ACTION: {"type": "ACTION", "shape": [self.action_width]}}


def read_features(policy: OpenpiPolicyConfig, data: DatasetConfig, stats: Stats) -> Features:
    """The features of a policy, or a `UserError` with all that lerobot has no place for."""
    transforms = tuple(data.transforms())
    if problems := [*_problems(policy, data, transforms, stats)]:
        raise UserError("lerobot cannot hold this policy: " + "; ".join(problems))
    assert isinstance(data, LeRobotDatasetConfig)
    width = min([t.width for t in transforms if isinstance(t, SliceActions)] or [len(stats["actions"].mean)])
    # Given statistics (data.norm_stats) may be wider than the data.
    widths = [len(stats["state"].mean)] if data.state else []
    widths += [t.width for t in transforms if isinstance(t, CheckState)]
    # lerobot takes as observations what is named so; other columns come in under the policy's camera names.
    columns = [(camera, data.images[camera]) for camera in CAMERAS if camera in data.images]
    return Features(
        images={
            column if column.startswith("observation.") else f"observation.images.{camera}": column
            for camera, column in columns
        },
        state_width=min(widths) if data.state else 0,
        action_width=width,
        relative=next((_mask(t, width) for t in transforms if isinstance(t, RELATIVE)), ()),
        notes=tuple(_notes(data)),
    )


def _notes(data: LeRobotDatasetConfig) -> Iterator[str]:
    if data.default_prompt and not data.prompt_from_task:
        yield f"`task` was always `{data.default_prompt}` in training: hand in that."
    elif data.default_prompt:
        yield f"Without a task, hand in `{data.default_prompt}` as `task`, as in training."
    if data.stride > 1:
        yield f"The actions of a chunk are {data.stride} frames of the training data apart, not one."


def _mask(transform: RelativeActions | RelativeUnless, width: int) -> tuple[bool, ...]:
    if isinstance(transform, RelativeUnless):
        return tuple(number not in transform.absolute for number in range(width))
    return (*transform.mask, *(False,) * width)[:width]


def _problems(
    policy: OpenpiPolicyConfig, data: DatasetConfig, transforms: tuple[Transform, ...], stats: Stats
) -> Iterator[str]:
    if policy.variant != "base":
        yield f"it builds the published size only, and policy.variant is {policy.variant!r}"
    elif (entries := load_processor(policy.files()["tokenizer"]).vocab_size()) < GEMMA_ENTRIES:
        yield f"it reads {TOKENIZER}'s tokenizer, and policy.tokenizer has {entries} entries"
    name = data.config_name or type(data).__name__
    repack = data.repack()
    if not isinstance(data, LeRobotDatasetConfig) or type(repack) is not Concatenate:
        yield f"{name} repacks rows by {type(repack).__name__}, for which it has no step"
        return
    if repack.crops:
        yield f"{name} crops {', '.join(repack.crops)}, for which it has no step"
    if len(data.state) > 1:
        yield f"its state is one column, and data.state joins {', '.join(data.state)}"
    if not data.state and policy.type == "pi0":
        yield "its π0 needs a state, and data.state is empty"
    if others := [type(t).__name__ for t in transforms if type(t) not in (SliceActions, CheckState, *RELATIVE)]:
        yield f"it has no step for {', '.join(others)} of {name}"
    relative = [t for t in transforms if isinstance(t, RELATIVE)]
    if len(relative) > 1:
        yield f"it makes actions relative once, {name} does {len(relative)} times"
    if relative and data.state and len(stats["state"].mean) < len(stats["actions"].mean):
        yield "its relative actions need a state with at least as many numbers as the action"
