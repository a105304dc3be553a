"""Propose a dataset format from metadata: which camera is which, which numbers are state and action.

Only names are available, so everything here is a proposal, to be checked by somebody who knows the robot.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rlinf_core import UserError
from rlinf_plugins_openpi.model.dimensions import CAMERAS

BASE, LEFT, RIGHT = CAMERAS

Features = Mapping[str, Mapping[str, Any]]
"""Column -> `dtype`, `shape` and `names`, as in `meta/info.json`."""

_BOOKKEEPING = re.compile(r"(timestamp|index|frame_index|episode_index|task_index|next\..*|reward|done|success)")
_WRIST = re.compile(r"wrist|gripper|hand")
_DISPLACEMENT = re.compile(r"delta|relative|displacement|velocit|(^|[^a-z])(rel|vel|d(x|y|z|roll|pitch|yaw))([^a-z]|$)")
_GRIPPER = re.compile(r"gripper|finger")
_STATE = re.compile(r"state|qpos|propri")


@dataclass(frozen=True)
class Vector:
    """A column that contains vectors."""

    column: str
    names: tuple[str, ...]
    """One per number; empty strings if the dataset has no names."""


@dataclass(frozen=True)
class Proposal:
    """A proposed format for a dataset."""

    images: dict[str, str]
    """Camera of the policy -> column."""
    other_images: tuple[str, ...]
    """Image columns that are not used, or are not RGB."""
    state: tuple[Vector, ...]
    actions: tuple[Vector, ...]
    other_vectors: tuple[Vector, ...]
    gripper: tuple[int, ...]
    """Indices of the action that are a gripper, by name."""
    is_delta: bool
    """Whether actions look like displacements; also true without evidence: then they are trained as recorded."""
    evidence: str
    """The reason for `is_delta`, as a sentence."""


def propose(dataset: str, features: Features) -> Proposal:
    """Propose a format.

    Args:
        dataset: The name given by the user, for messages.
        features: The columns of the dataset.

    Raises:
        UserError: The columns include no camera, no action or no state.
    """
    colour, other = _images(features)
    if not colour:
        raise UserError(f"{dataset} has no camera: a format needs a column of RGB images; {_listed(features)}")
    vectors = [Vector(name, _names(feature)) for name, feature in features.items() if _is_vector(name, feature)]
    actions = _pick(vectors, ("action", "actions"), "action")
    left = [vector for vector in vectors if "action" not in vector.column]
    state = _pick(left, ("observation.state", "state"), _STATE) or left
    for found, what in ((actions, "action"), (state, "state")):
        if not found:
            raise UserError(f"{dataset} has no column of floats that looks like the {what}; {_listed(features)}")
    images = _place(colour)
    names = [name for vector in actions for name in vector.names]
    owners = [vector.column for vector in actions for _ in vector.names]
    both = zip(names, owners, strict=True)
    gripper = tuple(i for i, pair in enumerate(both) if any(_GRIPPER.search(text.lower()) for text in pair))
    is_delta, evidence = _is_delta(actions, state, gripper)
    return Proposal(
        images=images,
        other_images=(*(column for column in colour if column not in images.values()), *other),
        state=tuple(state),
        actions=tuple(actions),
        other_vectors=tuple(vector for vector in vectors if vector not in state and vector not in actions),
        gripper=gripper,
        is_delta=is_delta,
        evidence=evidence,
    )


def _images(features: Features) -> tuple[list[str], list[str]]:
    """Columns of RGB images, and of other images, such as depth."""
    images = {name: feature for name, feature in features.items() if feature["dtype"] in ("image", "video")}
    shapes = {name: feature.get("shape") or (3,) for name, feature in images.items()}  # May be unknown.
    colour = [name for name, shape in shapes.items() if 3 in shape and "depth" not in name.lower()]
    return colour, [name for name in images if name not in colour]


def _place(columns: Iterable[str]) -> dict[str, str]:
    """Assign columns to cameras: wrist cameras by side, one external camera as the base, others to what is free.

    Stereo pairs have a side in their names, too (DROID's `wrist_image_left`), so a side alone is the weakest evidence.
    """
    placed: dict[str, str] = {}
    rest = []
    for column in columns:
        name = column.lower()
        on_wrist = bool(_WRIST.search(name))
        side = RIGHT if re.search(r"right", name) else LEFT
        if on_wrist and side not in placed:
            placed[side] = column
        elif not on_wrist and BASE not in placed and not re.search(r"left|right", name):
            placed[BASE] = column
        else:
            rest.append(column)
    for column in rest:
        side = RIGHT if "right" in column.lower() else LEFT
        wanted = [BASE, side, LEFT, RIGHT] if BASE not in placed else [side, LEFT, RIGHT]
        free = next((camera for camera in wanted if camera not in placed), None)
        if free:
            placed[free] = column
    return {camera: placed[camera] for camera in CAMERAS if camera in placed}


def _is_vector(name: str, feature: Mapping[str, Any]) -> bool:
    is_float = feature["dtype"] in ("float32", "float64") and len(feature["shape"]) == 1
    return is_float and not _BOOKKEEPING.fullmatch(name)


def _names(feature: Mapping[str, Any]) -> tuple[str, ...]:
    """A name for each number: datasets store them as lists, lists of lists, or dicts of lists."""
    names = list(_flat(feature.get("names")))
    width = int(feature["shape"][0])
    return tuple(names) if len(names) == width else ("",) * width


def _flat(names: Any) -> Iterable[str]:
    if isinstance(names, Mapping):
        # Either headings with lists of names, or names with their indices.
        names = list(names.values()) if any(isinstance(value, list) for value in names.values()) else list(names)
    if isinstance(names, str):
        yield " ".join(names.split())
    for one in names if isinstance(names, list) else ():
        yield from _flat(one)


def _pick(vectors: list[Vector], exact: tuple[str, ...], pattern: str | re.Pattern[str]) -> list[Vector]:
    """The column with the usual name, or all columns whose names match."""
    for name in exact:
        if found := [vector for vector in vectors if vector.column == name]:
            return found
    return [vector for vector in vectors if re.search(pattern, vector.column.lower())]


def _is_delta(actions: list[Vector], state: list[Vector], gripper: tuple[int, ...]) -> tuple[bool, str]:
    names = [name for vector in actions for name in vector.names]
    texts = [vector.column for vector in actions] + names
    if found := [text for text in texts if _DISPLACEMENT.search(text.lower())]:
        return True, f"The names suggest displacements or velocities ({', '.join(dict.fromkeys(found))})."
    reached = [name for vector in state for name in vector.names]
    arm = [i for i in range(len(names)) if i not in gripper]
    if arm and all(i < len(reached) and names[i] and names[i] == reached[i] for i in arm):
        return (
            False,
            "The numbers of the action have the same names as those of the state, so they look like target positions.",
        )
    return True, "The names give no evidence."


def _listed(features: Features) -> str:
    kinds = (f"{name} ({feature['dtype']} {list(feature.get('shape') or ())})" for name, feature in features.items())
    return f"its columns are {', '.join(kinds) or 'none'}"
