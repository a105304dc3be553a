"""The `[data]` table that the dataset formats for π0 and π0.5 share.

A format of your own subclasses `Pi0DatasetConfig` or `Pi05DatasetConfig` and fills in the facts of the robot. It needs
no class at all with `pi0_custom` and `pi05_custom`, which take every fact from TOML. The `run_defaults` of a class
replace those of its parent; they are not merged.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

from rlinf_core import LeRobotDatasetConfig
from rlinf_core.data.rotations import (
    NormalForm,
    RelativePoses,
    RelativeRotations,
    RotationFormat,
    RotationsTo6D,
    numbers_of,
)
from rlinf_core.data.transforms import (
    CheckState,
    RelativeActions,
    RelativeUnless,
    SliceActions,
    Transform,
)
from rlinf_plugins_openpi.inputs.transforms import OrderState, PadToActionDim
from rlinf_plugins_openpi.model.dimensions import CAMERAS

Number = Annotated[int, Field(ge=0)]
"""Index of a number in the state or the action, counted from 0."""

ROLES: Mapping[str, tuple[str, ...]] = {
    "base_0_rgb": ("observation/image", "images/agentview"),
    "left_wrist_0_rgb": ("observation/wrist_image", "images/wrist"),
}
"""Camera of the policy -> its names in openpi's LIBERO client and in vla-eval, which name it by its role."""
WAYS = ("raw_action_is_delta", "relative")
"""The two ways to specify what the policy is trained on; exactly one is in effect."""
HOW = (
    "raw_action_is_delta = true (train on actions as they are), "
    "raw_action_is_delta = false (relative to the state, except the numbers in gripper), "
    "or relative = [true, ...] (a mask: which numbers are relative to the state)"
)


class Assets(BaseModel):
    """openpi's `AssetsConfig`, for local folders: statistics are in `<assets_dir>/<asset_id>/norm_stats.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    assets_dir: str = Field(min_length=1)
    """The `assets` folder of a checkpoint."""
    asset_id: str = ""
    """The folder within `assets_dir`; empty: the name of the dataset."""

    def file(self, repo_id: str) -> str:
        """The path of the statistics for a dataset with this `data.repo_id`."""
        return str(Path(self.assets_dir) / (self.asset_id or asset_name(repo_id)) / "norm_stats.json")


def asset_name(repo_id: str) -> str:
    """The asset id of a dataset in openpi: its hub id without the revision, or the name of its local folder."""
    on_hub = re.fullmatch(r"(\w[\w.-]*/\w[\w.-]*)(@.+)?", repo_id)
    return on_hub[1] if on_hub and not Path(repo_id).exists() else Path(repo_id).name


class OpenpiDatasetConfig(LeRobotDatasetConfig):
    """Settings for datasets of both policies: the three cameras, and what the policy is trained to predict."""

    raw_action_is_delta: bool | None = None
    """true: train on actions as recorded. false: the recorded actions are absolute; train on their difference from the
    state at the start of the chunk, except for the numbers in `gripper`. Alternatively, set `relative`."""
    gripper: tuple[Number, ...] | None = None
    """Indices of the action, counted from 0, that stay absolute with `raw_action_is_delta = false`; required then, but
    may be empty."""
    relative: tuple[bool, ...] | None = None
    """A mask over the action: true makes a number relative to the same number of the state; false, or the end of the
    mask, leaves it absolute. The general form, instead of `raw_action_is_delta`."""
    action_train_with_rotation_6d: bool = False
    """Whether the policy sees and predicts rotations as six numbers, a continuous format (see `rotation_format`)."""
    rotation_format: RotationFormat | None = None
    """Format of rotations in the data: quaternions, axis-angle vectors, or Euler angles in SciPy's notation
    (`euler_xyz`: about the fixed axes x, then y, then z; `euler_XYZ`: about the axes of the rotating body), in radians;
    or `rotation_6d`, six numbers already."""
    state_rotations: tuple[Number, ...] = ()
    """Index of the first number of each rotation in the state, counted from 0."""
    action_rotations: tuple[Number, ...] = ()
    """Index of the first number of each rotation in the action, counted from 0."""
    relative_poses: bool = False
    """With relative actions: the three numbers before each rotation are its position, and a relative pose is expressed
    in the frame of the state's pose, as rigid transforms compose. Otherwise positions are subtracted, along the axes of
    the base."""
    state_order: tuple[Number, ...] = ()
    """Which numbers of the recorded state are used, in which order, counted from 0; all other fields then refer to this
    order. Empty: all, as recorded."""
    state_width: int = Field(default=0, ge=0)
    """Width of the robot's state; data of another width are an error. 0: any width."""
    action_width: int = Field(default=0, ge=0)
    """Width of the robot's action, to which the policy's action is cut. 0: the width of the statistics."""
    padded_width: int = Field(default=0, ge=0)
    """Width to which state and action are padded before normalisation, so that statistics have this width, too; RLinf
    does so for some formats. 0: the policy pads after normalisation. Both are equivalent for a policy that normalises
    by mean and standard deviation; quantiles would turn the padding into -1."""
    pad_state: bool = True
    """Whether `padded_width` is that of the state, too; otherwise only of actions. A state in the prompt is written
    with its padding."""
    assets: Assets | None = None
    """Use statistics from an openpi checkpoint: `{ assets_dir, asset_id }` instead of `norm_stats`."""

    def mistakes(self) -> list[str]:
        """Contradictions between fields, and required fields that are not set."""
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
        """Columns, and the widths that the class sets."""
        widths = {"state_dim": "state_width", "action_dim": "action_width"}
        return super().facts() | {key: cls.model_fields[name].get_default() or None for key, name in widths.items()}

    def given_statistics(self) -> str:
        """`norm_stats`, or the file that `assets` refers to."""
        return self.assets.file(self.repo_id) if self.assets else self.norm_stats

    def repack(self) -> Transform:
        """Columns to the keys of a sample; the state in its order, rotations in the normal form of the inverse."""
        repack = super().repack()
        if self.state_order:
            repack = OrderState(repack, self.state_order)
        turn = self._rotations
        return NormalForm(repack, turn.form, turn.state, turn.actions) if turn else repack

    def observation_names(self) -> Mapping[str, str]:
        """The names of openpi's clients and of vla-eval's simulators.

        `observation/<column>` is openpi's for LIBERO and DROID, `images/cam_high` and `state` are those for ALOHA.
        Others have the camera's role: `observation/image`, `observation/wrist_image`.
        """
        names = dict(super().observation_names())
        for camera, column in self.images.items():
            short = column.rpartition(".")[2]
            for name in (*ROLES.get(camera, ()), f"images/{short}", f"observation/{short}"):
                names[name] = column
        for column in self.state:
            names[f"observation/{column.rpartition('.')[2]}"] = column
        if len(self.state) == 1:
            names |= dict.fromkeys(("state", "states", "observation/state"), self.state[0])
        return names

    def transforms(self) -> Sequence[Transform]:
        """Six-number rotations, relative actions and padding, each if it is set.

        The inverses end by cutting to the robot's action. In an override, `(*own, *super().transforms())` applies `own`
        to the numbers as recorded.
        """
        steps: list[Transform] = []
        if self.state_width:
            steps.append(CheckState(self.state_width))
        if self.action_width:
            steps.append(SliceActions(self.action_width))
        if self._rotations:
            steps.append(self._rotations)
        fill = [PadToActionDim(self.padded_width, pad_state=self.pad_state)] if self.padded_width else []
        # A mask may extend into the padding, as RLinf's does. Without a mask the padding stays 0, whatever the state.
        return (*steps, *fill, *self._make_relative()) if self._mask else (*steps, *self._make_relative(), *fill)

    @property
    def _way(self) -> list[str]:
        """Which of `WAYS` are in effect: fields that are set override the class, which overrides its parents."""
        for said in (self.model_fields_set, *(vars(cls).get("__annotations__", {}) for cls in type(self).__mro__)):
            if found := [way for way in WAYS if way in said and getattr(self, way) is not None]:
                return found
        return []

    @property
    def _absolute(self) -> tuple[int, ...] | None:
        """`gripper`, if it is in effect."""
        return self.gripper if self._way == ["raw_action_is_delta"] and not self.raw_action_is_delta else None

    @property
    def _mask(self) -> tuple[bool, ...]:
        """`relative`, if it is in effect."""
        return (self.relative or ()) if self._way == ["relative"] else ()

    @property
    def _rotations(self) -> RotationsTo6D | None:
        if not self.action_train_with_rotation_6d or not self.rotation_format:
            return None
        return RotationsTo6D(
            self.rotation_format, tuple(sorted(self.state_rotations)), tuple(sorted(self.action_rotations))
        )

    def _make_relative(self) -> Iterator[Transform]:
        """Subtract the state; compose rotations with its inverse."""
        absolute, mask, turn = self._absolute, self._mask, self._rotations
        starts = [turn.place(start) for start in turn.actions] if turn else []
        if turn and absolute is not None:
            absolute = (*map(turn.place, absolute), *(start + i for start in starts for i in range(6)))
        elif turn:
            starts = [turn.place(start) for start in turn.actions if any(mask[start : start + 1])]
            plain = {turn.place(i) for i, flag in enumerate(mask) if flag and i not in self._rotating}
            mask = tuple(i in plain for i in range(max(plain, default=-1) + 1))
        relative = absolute is not None or bool(self._mask)
        positions = {start - i for start in starts for i in (1, 2, 3)} if self.relative_poses else set()
        if absolute is not None:
            yield RelativeUnless((*absolute, *sorted(positions)))
        elif any(mask := tuple(flag and i not in positions for i, flag in enumerate(mask))):
            yield RelativeActions(mask)
        if starts and relative:
            yield RelativePoses(tuple(start - 3 for start in starts)) if positions else RelativeRotations(tuple(starts))

    @property
    def _rotating(self) -> dict[int, int]:
        """Index of a number of the action that is part of a rotation -> index of that rotation's first number."""
        if not self._rotations:
            return {}
        return {start + i: start for start in self.action_rotations for i in range(self._rotation_width)}

    @property
    def _rotation_width(self) -> int:
        return numbers_of(self.rotation_format or "")

    def _wrong_cameras(self) -> Iterator[str]:
        if unknown := sorted(self.images.keys() - set(CAMERAS)):
            yield f"the policy has no camera {', '.join(unknown)}: name some of {', '.join(CAMERAS)}"
        if not self.images:
            yield f"images is empty: name the image column of at least one of {', '.join(CAMERAS)}"

    def _wrong_ways(self) -> Iterator[str]:
        if len(self._way) != 1:
            both = f"{' and '.join(self._way)} exclude each other, leave one out"
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
        if self.state_order and len({*self.state_order}) < len(self.state_order):
            yield "state_order names a number of the state twice"
        if self.state_order and self.state_width not in (0, len(self.state_order)):
            yield f"state_width = {self.state_width}, but state_order has {len(self.state_order)} entries"
        if not self.pad_state and not self.padded_width:
            yield "pad_state = false needs padded_width: nothing else is padded before normalisation"
        if self.padded_width and not action:
            yield "padded_width needs action_width: nothing else knows how wide the robot's own action is"
        if 0 < self.padded_width < max(action, self.state_width if self.pad_state else 0):
            yield f"padded_width = {self.padded_width} is narrower than the state or the action"

    def _wrong_rotations(self) -> Iterator[str]:
        fields = {name: getattr(self, name) for name in ("rotation_format", "state_rotations", "action_rotations")}
        if not self.action_train_with_rotation_6d:
            if extra := [name for name, value in {**fields, "relative_poses": self.relative_poses}.items() if value]:
                yield f"{' and '.join(extra)} need action_train_with_rotation_6d = true"
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
        if self.relative_poses:
            yield from self._wrong_poses(relative)

    def _wrong_poses(self, relative: bool) -> Iterator[str]:
        """`relative_poses`: there is a position before each rotation, which is treated as the rotation is."""
        if not relative:
            yield "relative_poses = true has no effect: no action is relative to the state"
        width = self._rotation_width
        taken = {i for start in self.action_rotations for i in range(start, start + width)}
        for start in sorted(self.action_rotations):
            before = range(start - 3, start)
            if start < 3 or taken & {*before}:
                yield f"relative_poses needs a position of three numbers before the rotation at {start}"
            elif inside := [str(i) for i in self._absolute or () if i in before]:
                yield f"gripper names {', '.join(inside)}, of the position of the pose whose rotation is at {start}"
            elif self._mask and len({*(*self._mask, *(False,) * start)[start - 3 : start + width]}) > 1:
                yield f"relative must be the same for all numbers of the pose whose rotation is at {start}"

    def _wrong_assets(self) -> Iterator[str]:
        if self.assets and self.norm_stats:
            yield "set norm_stats or assets, not both"
        if self.assets and not self.assets.asset_id and not asset_name(self.repo_id):
            yield "assets needs asset_id, or a repo_id to take its place"

    @model_serializer(mode="wrap")
    def _in_force(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out fields that others override: a dump with both would be refused when it is read again."""
        table: dict[str, Any] = write(self)
        for way in WAYS:
            if self._way and way not in self._way:
                table.pop(way, None)
        if self._absolute is None and self.gripper:
            table.pop("gripper", None)
        return table


class Pi0DatasetConfig(OpenpiDatasetConfig):
    """A dataset that trains π0 unless its class sets another policy."""

    run_defaults: ClassVar[Mapping[str, Any]] = {"policy": {"type": "pi0"}}


class Pi05DatasetConfig(OpenpiDatasetConfig):
    """A dataset that trains π0.5 unless its class sets another policy."""

    run_defaults: ClassVar[Mapping[str, Any]] = {"policy": {"type": "pi05"}}
