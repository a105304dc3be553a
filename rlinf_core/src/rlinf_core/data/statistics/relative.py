"""Diagnose subtractions of the state from the action that mean nothing: of other joints, across ±π, of quaternions.

`RelativeActions` subtracts by index. Names in the metadata show whether both numbers are of one joint; the numbers show
whether they are angles that jump by a whole turn, or a quaternion whose sign flips while the rotation does not.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rlinf_core.contract.datasets import SampleSource
from rlinf_core.data.normalize import Vector
from rlinf_core.data.statistics.action_kind import Flags, pairs, treatment
from rlinf_core.data.statistics.compute import Distribution, outputs
from rlinf_core.data.statistics.diagnose import Finding
from rlinf_core.data.transforms import Transform

MANY_PAIRS = 32_768
"""Pairs of rows to search for jumps once the numbers look like angles or quaternions: few rows may have one."""
PAIRS_AT_A_TIME = 4096
HALF_TURNS = (np.pi, 180.0)
"""Radians and degrees."""
UNIT = 0.02
"""How far the norm of a quaternion may be from 1."""
MOST_SHOWN = 6
FEWEST_KINDS = 3
"""Numbers that are a joint here and a coordinate there, for this to be no coincidence of words."""

ROLES = frozenset(
    (
        *("action", "actions", "state", "states", "observation", "obs", "current", "measured", "present", "desired"),
        *("target", "goal", "cmd", "command", "commanded", "main", "leader", "follower", "master", "puppet"),
        *("pos", "position", "qpos", "k"),
    )
)
"""Words of a name that say who measures or commands, not what."""
CARTESIAN = frozenset(("x", "y", "z", "roll", "pitch", "yaw", "rx", "ry", "rz", "rw", "qx", "qy", "qz", "qw"))
JOINTS = frozenset(("joint", "shoulder", "elbow", "forearm", "waist", "wrist", "hip", "knee", "ankle"))


def diagnose_relative(
    source: SampleSource,
    transforms: Sequence[Transform],
    names: Mapping[str, Sequence[str]],
    distributions: Mapping[str, Distribution],
) -> list[Finding]:
    """Findings about numbers of the action that the transforms make relative to the state.

    Args:
        source: Training rows.
        transforms: Repacking, then the dataset's transforms.
        names: `state` and `actions` -> the name of each recorded number; empty if the dataset does not name them.
        distributions: Of the transformed training rows.
    """
    rows = pairs(source)
    if not len(rows) or "actions" not in distributions:
        return []
    seen = _Pairs.of(source, transforms[:1], rows)
    if seen is None:
        return []
    _, relative = treatment(source, transforms, rows, seen.state.shape[1])
    if not relative.any():
        return []
    reach = np.maximum(np.abs(distributions["actions"].running.low), np.abs(distributions["actions"].running.high))
    angles = _maybe_angles(seen, relative, reach)
    quaternions = _quaternions(seen, relative)
    if angles or quaternions:
        more = pairs(source, MANY_PAIRS)
        seen = _Pairs.of(source, transforms[:1], more) or seen
    return [
        *_other_names(names.get("state", ()), names.get("actions", ()), relative),
        *_turns(seen, angles, distributions["actions"]),
        *_flips(seen, quaternions),
    ]


@dataclass(frozen=True)
class _Pairs:
    """Consecutive rows, in the data's own units; all are [pairs, width of the narrower of state and action]."""

    state: Vector
    following: Vector
    """The state of the next row."""
    action: Vector
    """The first action of the chunk."""

    @staticmethod
    def of(source: SampleSource, repack: Sequence[Transform], rows: NDArray[np.int64]) -> _Pairs | None:
        parts = []
        for start in range(0, len(rows), PAIRS_AT_A_TIME):
            some = rows[start : start + PAIRS_AT_A_TIME]
            here, after = (outputs(source, repack, indices.tolist()) for indices in (some, some + 1))
            if "state" not in here or "actions" not in here:
                return None
            width = min(here["state"].shape[-1], here["actions"].shape[-1])
            parts.append((here["state"][:, :width], after["state"][:, :width], here["actions"][:, 0, :width]))
        return _Pairs(*(np.concatenate(values) for values in zip(*parts, strict=True)))


def _maybe_angles(seen: _Pairs, relative: Flags, reach: Vector) -> list[tuple[int, float]]:
    """Relative numbers, with their half turn, that reach a whole turn although state and action stay within one."""
    low = np.minimum(seen.state.min(axis=0), seen.action.min(axis=0))
    high = np.maximum(seen.state.max(axis=0), seen.action.max(axis=0))
    return [
        (i, half)
        for half in HALF_TURNS
        for i in np.flatnonzero(relative).tolist()
        if i < len(reach) and 1.5 * half < reach[i] < 2.05 * half and high[i] - low[i] < 2.05 * half
    ]


def _turns(seen: _Pairs, angles: Sequence[tuple[int, float]], actions: Distribution) -> Iterator[Finding]:
    found, share, half_turn = [], 0.0, np.pi
    for i, half in angles:
        steps = np.abs(np.stack([seen.action[:, i] - seen.state[:, i], seen.following[:, i] - seen.state[:, i]]))
        jumps, between = steps > 1.5 * half, (steps > 0.5 * half) & (steps <= 1.5 * half)
        if jumps.sum() > between.sum():
            found.append(i)
            share, half_turn = max(share, float(jumps.any(axis=0).mean())), half
    if not found:
        return
    first, turn = found[0], "2π" if half_turn == np.pi else "360 degrees"
    low, high = actions.running.low[first], actions.running.high[first]
    yield Finding(
        "relative-angle-jumps",
        "warning",
        "actions",
        tuple(found),
        f"the state is subtracted from angles, which jump by {turn} in up to {share:.2%} of the rows: "
        f"number {first} is from {low:.3g} to {high:.3g}, although state and action stay within a turn",
        "If three angles or numbers are a rotation, data.action_train_with_rotation_6d with data.rotation_format "
        "composes it instead; otherwise leave the angle absolute (data.relative), or unwrap it in the dataset",
    )


def _quaternions(seen: _Pairs, relative: Flags) -> list[int]:
    """The first number of every four relative ones whose norm is 1 in all pairs; some may always be 0."""
    found: list[int] = []
    maybe = relative | ((seen.state == 0).all(axis=0) & (seen.action == 0).all(axis=0))
    for i in range(len(relative) - 3):
        norms = np.linalg.norm(seen.state[:, i : i + 4], axis=1)
        if maybe[i : i + 4].all() and (not found or i >= found[-1] + 4) and (np.abs(norms - 1) < UNIT).all():
            found.append(i)
    return found


def _flips(seen: _Pairs, quaternions: Sequence[int]) -> Iterator[Finding]:
    for i in quaternions:
        here, after, action = (part[:, i : i + 4] for part in (seen.state, seen.following, seen.action))
        flips = ((here * after).sum(axis=1) < -0.5) | ((here * action).sum(axis=1) < -0.5)
        if flips.any():
            yield Finding(
                "relative-quaternion-flips",
                "warning",
                "actions",
                tuple(range(i, i + 4)),
                f"the state is subtracted from a quaternion whose sign flips in {flips.mean():.2%} of the rows, though "
                "q and -q are one rotation",
                "data.action_train_with_rotation_6d with data.rotation_format composes rotations instead; or make the "
                "signs of consecutive rows agree in the dataset",
            )


def _other_names(state: Sequence[str], action: Sequence[str], relative: Flags) -> Iterator[Finding]:
    """A finding if the dataset's names say that other numbers are subtracted."""
    wrong = mismatches(state, action, relative)
    if not wrong:
        return
    shown = [f"{action[i]!r} minus {state[i]!r} at {i}" + _elsewhere(state, action[i]) for i in wrong[:MOST_SHOWN]]
    more = f" and {len(wrong) - MOST_SHOWN} more" if len(wrong) > MOST_SHOWN else ""
    absolute = ", ".join(map(str, wrong))
    yield Finding(
        "relative-other-name",
        "warning",
        "actions",
        tuple(wrong),
        f"the state is subtracted by index, but the dataset names other numbers: {', '.join(shown)}{more}",
        f"Leave them absolute (false at {absolute} in data.relative, or data.gripper), or write state and action in "
        "one order",
    )


def mismatches(state: Sequence[str], action: Sequence[str], relative: Flags) -> list[int]:
    """Indices of relative numbers whose names show that another number is subtracted.

    Only evidence counts: the action's name is elsewhere in the state, or the state's elsewhere in the action, or
    several numbers are a joint here and a coordinate there. Different words, which may mean the same (`motor_1` and
    `waist`, `wrist_roll` and `roll`), do not.
    """
    here, there = _from_one_base(_plain(state), _plain(action))
    differ = [i for i in np.flatnonzero(relative).tolist() if i < min(len(here), len(there)) and here[i] != there[i]]
    moved = {i for i in differ if there[i] in here or here[i] in there}
    other = {i for i in differ if {_kind(here[i]), _kind(there[i])} == {"joint", "coordinate"}}
    return sorted(moved | (other if len(other) >= FEWEST_KINDS else set()))


def _elsewhere(state: Sequence[str], name: str) -> str:
    plain = _plain([*state, name])
    found = [i for i, one in enumerate(plain[:-1]) if one == plain[-1]]
    return f" (it is {found[0]} in the state)" if len(found) == 1 else ""


Words = tuple[str, ...]


def _plain(names: Sequence[str]) -> list[Words]:
    """Names as words, without those that say who measures; `left_arm.Joint1.pos` -> left, arm, joint, 1."""
    words = [tuple(re.findall(r"[a-z]+|\d+", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", n).lower())) for n in names]
    short = [tuple(word for word in one if word not in ROLES) or one for one in words]
    return short if len(set(short)) == len(set(words)) else words


def _from_one_base(state: list[Words], action: list[Words]) -> tuple[list[Words], list[Words]]:
    """Count numbered names from one base: `joint_0` to `joint_5` here, `joint_1` to `joint_6` there."""
    for stem in {one[:-1] for one in (*state, *action) if one and one[-1].isdigit()}:
        here, there = _numbers(state, stem), _numbers(action, stem)
        if here != there and len(here) == len(there):
            state, action = _counted(state, stem, here), _counted(action, stem, there)
    return state, action


def _numbers(names: list[Words], stem: Words) -> list[int]:
    """The numbers after a stem, ascending."""
    return sorted({int(one[-1]) for one in names if one and one[:-1] == stem and one[-1].isdigit()})


def _counted(names: list[Words], stem: Words, numbers: list[int]) -> list[Words]:
    """The names with the place of their number among all in its stead."""
    ours = [bool(one) and one[:-1] == stem and one[-1].isdigit() for one in names]
    return [(*n[:-1], str(numbers.index(int(n[-1])))) if own else n for n, own in zip(names, ours, strict=True)]


def _kind(words: Words) -> str:
    if JOINTS.intersection(words):
        return "joint"
    return "coordinate" if CARTESIAN.intersection(words) else ""
