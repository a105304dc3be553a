"""Dataset formats for π0 and π0.5, a short file a family; each class is registered in the group `rlinf.datasets`.

A format of your own subclasses `Pi0DatasetConfig` or `Pi05DatasetConfig` and fills in the facts of the robot; or it has
no class at all: `pi0_custom` and `pi05_custom` take every fact from TOML. A class writes its `run_defaults` whole: they
replace those of its parent.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Annotated, Any, ClassVar

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from rlinf_core import LeRobotDatasetConfig
from rlinf_core.data.rotations import NormalForm, RelativeRotations, RotationFormat, RotationsTo6D
from rlinf_core.data.transforms import (
    CheckState,
    RelativeActions,
    RelativeUnless,
    SliceActions,
    Transform,
)
from rlinf_plugins_openpi.datasets.assets import Assets, asset_name
from rlinf_plugins_openpi.inputs.transforms import CAMERAS, PadToActionDim

Number = Annotated[int, Field(ge=0)]
"""Which number of a state or an action, counted from 0."""

WAYS = ("raw_action_is_delta", "relative")
"""The two ways to say what the policy is trained on; exactly one is in force."""
HOW = (
    "raw_action_is_delta = true (train on actions as they are), "
    "raw_action_is_delta = false (relative to the state, but for the numbers in gripper), "
    "or relative = [true, ...] (a mask: which numbers are relative to the state)"
)


class OpenpiDatasetConfig(LeRobotDatasetConfig):
    """What both policies' datasets share: the three cameras' names, and what the policy is trained to predict."""

    raw_action_is_delta: bool | None = None
    """true: the policy is trained on actions as they are. false: they are absolute, and it is trained on their distance
    to the state at the start of the chunk, but for the numbers in `gripper`. Or set `relative`."""
    gripper: tuple[Number, ...] | None = None
    """Numbers of the action, counted from 0, that stay absolute where `raw_action_is_delta = false`; required then, may
    be empty."""
    relative: tuple[bool, ...] | None = None
    """Which numbers of the action become relative to the same number of the state; those not named stay absolute. The
    general form, instead of `raw_action_is_delta`."""
    action_train_with_rotation_6d: bool = False
    """Whether the policy sees and predicts rotations as six numbers, which have no jumps (see `rotation_format`)."""
    rotation_format: RotationFormat | None = None
    """How the data hold rotations: quaternions, an axis times its angle, or Euler angles in SciPy's notation
    (`euler_xyz`: about the fixed axes x, then y, then z; `euler_XYZ`: about the turning body's). Radians."""
    state_rotations: tuple[Number, ...] = ()
    """First number of each rotation in the state, counted from 0."""
    action_rotations: tuple[Number, ...] = ()
    """First number of each rotation in the action, counted from 0."""
    state_width: int = Field(default=0, ge=0)
    """Numbers of the robot's state, to which the data are held; 0: as many as they have."""
    action_width: int = Field(default=0, ge=0)
    """Numbers of the robot's action, to which the policy's is cut; 0: as many as the statistics have."""
    padded_width: int = Field(default=0, ge=0)
    """Numbers to which state and action are filled up before they are normalised, so that statistics are as wide, as
    RLinf does for some formats; 0: filled up afterwards, by the policy. The same to a policy that normalises by mean
    and spread; quantiles would turn the filling into -1."""
    assets: Assets | None = None
    """Statistics to use, where openpi keeps them: `{ assets_dir, asset_id }` instead of `norm_stats`."""

    def mistakes(self) -> list[str]:
        """What is wrong with the fields taken together, and what is not said."""
        return [
            *super().mistakes(),
            *self._wrong_cameras(),
            *self._wrong_ways(),
            *self._wrong_widths(),
            *self._wrong_rotations(),
            *self._wrong_assets(),
        ]

    @classmethod
    def facts(cls) -> dict[str, Any]:
        """Columns, and the widths that the class states."""
        widths = {"state_dim": "state_width", "action_dim": "action_width"}
        return super().facts() | {key: cls.model_fields[name].get_default() or None for key, name in widths.items()}

    def given_statistics(self) -> str:
        """`norm_stats`, or the file that `assets` leads to."""
        return self.assets.file(self.repo_id) if self.assets else self.norm_stats

    def repack(self) -> Transform:
        """Columns to a sample's keys; rotations are written the one way in which they come back."""
        repack = super().repack()
        turn = self._rotations
        return NormalForm(repack, turn.form, turn.state, turn.actions) if turn else repack

    def transforms(self) -> Sequence[Transform]:
        """Rotations in six numbers, relative actions, filling up: each where asked for.

        The inverses end with the cut to the robot's action. Overridden, `(*own, *super().transforms())` sees the data's
        own numbers.
        """
        steps: list[Transform] = []
        if self.state_width:
            steps.append(CheckState(self.state_width))
        if self.action_width:
            steps.append(SliceActions(self.action_width))
        if self._rotations:
            steps.append(self._rotations)
        fill = [PadToActionDim(self.padded_width)] if self.padded_width else []
        # A mask may reach into the filling, as RLinf's does. Otherwise it stays 0, however wide the state is.
        return (*steps, *fill, *self._make_relative()) if self._mask else (*steps, *self._make_relative(), *fill)

    @property
    def _way(self) -> list[str]:
        """Which of `WAYS` is said, and in force: what is set covers what the class says, that covers its parents."""
        for said in (self.model_fields_set, *(vars(cls).get("__annotations__", {}) for cls in type(self).__mro__)):
            if found := [way for way in WAYS if way in said and getattr(self, way) is not None]:
                return found
        return []

    @property
    def _absolute(self) -> tuple[int, ...] | None:
        """`gripper` where it is in force."""
        return self.gripper if self._way == ["raw_action_is_delta"] and not self.raw_action_is_delta else None

    @property
    def _mask(self) -> tuple[bool, ...]:
        """`relative` where it is in force."""
        return (self.relative or ()) if self._way == ["relative"] else ()

    @property
    def _rotations(self) -> RotationsTo6D | None:
        if not self.action_train_with_rotation_6d or not self.rotation_format:
            return None
        return RotationsTo6D(
            self.rotation_format, tuple(sorted(self.state_rotations)), tuple(sorted(self.action_rotations))
        )

    def _make_relative(self) -> Iterator[Transform]:
        """By subtraction; rotations by composition."""
        absolute, mask, turn = self._absolute, self._mask, self._rotations
        starts = [turn.place(start) for start in turn.actions] if turn else []
        if turn and absolute is not None:
            absolute = (*map(turn.place, absolute), *(start + i for start in starts for i in range(6)))
        elif turn:
            starts = [turn.place(start) for start in turn.actions if any(mask[start : start + 1])]
            plain = {turn.place(i) for i, flag in enumerate(mask) if flag and i not in self._rotating}
            mask = tuple(i in plain for i in range(max(plain, default=-1) + 1))
        if absolute is not None:
            yield RelativeUnless(absolute)
        elif any(mask):
            yield RelativeActions(mask)
        if starts and (absolute is not None or self._mask):
            yield RelativeRotations(tuple(starts))

    @property
    def _rotating(self) -> dict[int, int]:
        """Numbers of the action that are part of a rotation -> the first of that rotation."""
        if not self._rotations:
            return {}
        return {start + i: start for start in self.action_rotations for i in range(self._rotation_width)}

    @property
    def _rotation_width(self) -> int:
        return 4 if self.rotation_format and self.rotation_format.startswith("quaternion") else 3

    def _wrong_cameras(self) -> Iterator[str]:
        if unknown := sorted(self.images.keys() - set(CAMERAS)):
            yield f"the policy has no camera {', '.join(unknown)}: name some of {', '.join(CAMERAS)}"
        if not self.images:
            yield f"images is empty: name the image column of at least one of {', '.join(CAMERAS)}"

    def _wrong_ways(self) -> Iterator[str]:
        if len(self._way) != 1:
            both = f"{' and '.join(self._way)} exclude one another, leave one out"
            yield both if self._way else f"how are actions trained? Set {HOW}"
            return
        to_state = self._absolute is not None or any(self._mask)
        if self._way == ["raw_action_is_delta"] and not self.raw_action_is_delta:
            to_state = True
            if self.gripper is None:
                yield (
                    "raw_action_is_delta = false needs gripper: the numbers of the action, counted from 0, that stay "
                    "absolute, or [] if none does"
                )
        elif "gripper" in self.model_fields_set and self.gripper:
            yield (
                "gripper is for raw_action_is_delta = false only: leave data.gripper out, or set it to [], "
                "which the command line can do too"
            )
        if to_state and not self.state:
            yield "relative actions need a state: name its columns in state, or train on actions as they are"

    def _wrong_widths(self) -> Iterator[str]:
        action = self.action_width
        if action and len(self._mask) > max(action, self.padded_width):
            yield f"relative has {len(self._mask)} entries, an action has {action} numbers"
        if action and (beyond := [str(i) for i in self._absolute or () if i >= action]):
            yield f"gripper names {', '.join(beyond)}, an action has {action} numbers, counted from 0"
        if self.padded_width and not action:
            yield "padded_width needs action_width: nothing else knows how wide the robot's own action is"
        if 0 < self.padded_width < max(action, self.state_width):
            yield f"padded_width = {self.padded_width} is narrower than the state or the action"

    def _wrong_rotations(self) -> Iterator[str]:
        fields = {name: getattr(self, name) for name in ("rotation_format", "state_rotations", "action_rotations")}
        if not self.action_train_with_rotation_6d:
            if told := [name for name, value in fields.items() if value]:
                yield f"{' and '.join(told)} need action_train_with_rotation_6d = true"
            return
        if missing := [name for name in ("rotation_format", "action_rotations") if not fields[name]]:
            yield f"action_train_with_rotation_6d needs {' and '.join(missing)}"
            return
        for name, width in (("state_rotations", self.state_width), ("action_rotations", self.action_width)):
            starts = sorted(fields[name])
            if any(later - start < self._rotation_width for start, later in pairwise(starts)):
                yield f"{name} overlap: a rotation as {self.rotation_format} has {self._rotation_width} numbers"
            if width and starts and starts[-1] + self._rotation_width > width:
                yield f"{name} reach number {starts[-1] + self._rotation_width - 1}, there are {width}, counted from 0"
        yield from self._wrong_relative_rotations()

    def _wrong_relative_rotations(self) -> Iterator[str]:
        if inside := [str(i) for i in self._absolute or () if i in self._rotating]:
            yield f"gripper names {', '.join(inside)}, which action_rotations says are part of a rotation"
        for start in self.action_rotations:
            flags = {i < len(self._mask) and self._mask[i] for i in range(start, start + self._rotation_width)}
            if len(flags) > 1:
                yield f"relative must be the same for all numbers of the rotation at {start}"
        relative = self._absolute is not None or any(self._mask)
        if relative and sorted(self.state_rotations) != sorted(self.action_rotations):
            yield "relative actions with rotations in six numbers need state_rotations and action_rotations to be equal"

    def _wrong_assets(self) -> Iterator[str]:
        if self.assets and self.norm_stats:
            yield "set norm_stats or assets, not both"
        if self.assets and not self.assets.asset_id and not asset_name(self.repo_id):
            yield "assets needs asset_id, or a repo_id to take its place"

    @model_serializer(mode="wrap")
    def _in_force(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without what something that was set has put out of force: read again, both would seem to be said."""
        table: dict[str, Any] = write(self)
        for way in WAYS:
            if self._way and way not in self._way:
                table.pop(way, None)
        if self._absolute is None and self.gripper:
            table.pop("gripper", None)
        return table


class Pi0DatasetConfig(OpenpiDatasetConfig):
    """A dataset that trains π0 unless its class says otherwise."""

    run_defaults: ClassVar[Mapping[str, Any]] = {"policy": {"type": "pi0"}}


class Pi05DatasetConfig(OpenpiDatasetConfig):
    """A dataset that trains π0.5 unless its class says otherwise."""

    run_defaults: ClassVar[Mapping[str, Any]] = {"policy": {"type": "pi05"}}
