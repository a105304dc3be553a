"""Convert rotations between the formats that robots record and a continuous 6D representation for networks.

The six numbers are the first two columns of the rotation matrix, concatenated (Zhou et al. 2019, "On the Continuity of
Rotation Representations in Neural Networks"); unlike angles and quaternions they are continuous. Gram-Schmidt turns any
six predicted numbers back into a rotation.

Angles are in radians. For axis letters see `RotationFormat`. All functions accept any leading axes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from rlinf_core.data.sample import Row, Sample
from rlinf_core.data.transforms import Transform
from rlinf_core.errors import UserError

RotationFormat = Literal[
    "quaternion_wxyz",
    "quaternion_xyzw",
    "axis_angle",
    "euler_xyz",
    "euler_xzy",
    "euler_yxz",
    "euler_yzx",
    "euler_zxy",
    "euler_zyx",
    "euler_XYZ",
    "euler_XZY",
    "euler_YXZ",
    "euler_YZX",
    "euler_ZXY",
    "euler_ZYX",
    "rotation_6d",
]
"""How a rotation is recorded. Euler angles use SciPy's notation: `euler_xyz` is extrinsic, about the fixed axes x, then
y, then z (roll, pitch, yaw of most robots); `euler_XYZ` is intrinsic, about the axes of the rotating body.
`rotation_6d` is the network's own representation: data that were recorded in it are orthogonalised."""

_Vector = NDArray[np.floating]
_DEGENERATE = 1e-8  # In float32 data, a shorter vector has no reliable direction.
_GIMBAL_LOCK = 1e-14  # Below this cosine of the middle angle, the outer two rotate about the same axis.


@dataclass(frozen=True)
class RotationsTo6D(Transform):
    """Replace each rotation by its 6D representation, the first two columns of the rotation matrix.

    Dimensions after a rotation are shifted. The inverse orthogonalises any six numbers into a rotation.
    """

    batched: ClassVar[bool] = True

    form: RotationFormat
    state: tuple[int, ...]
    """First dimension of each rotation in the state, ascending."""
    actions: tuple[int, ...]
    """First dimension of each rotation in the action, ascending."""

    def __call__(self, sample: Sample) -> Sample:
        """State [D] -> [D + 3 or 2 per rotation], actions likewise; raises `UserError` if they are too narrow."""
        return self._changed(sample, self._encode)

    def inverse(self, sample: Sample) -> Sample:
        """Convert back to the data's format, in the canonical form of `from_matrix`."""
        return self._changed(sample, self._decode)

    def place(self, index: int) -> int:
        """The dimension in converted actions of a dimension of the data's action that belongs to no rotation."""
        return index + (6 - numbers_of(self.form)) * sum(start < index for start in self.actions)

    def _changed(self, sample: Sample, change: Callable[..., _Vector]) -> Sample:
        out = sample.copy()
        if self.state and "state" in sample:
            out["state"] = change("state", sample["state"], self.state)
        if self.actions and "actions" in sample:
            out["actions"] = change("actions", sample["actions"], self.actions)
        return out

    def _encode(self, key: str, vector: _Vector, starts: tuple[int, ...]) -> _Vector:
        width = numbers_of(self.form)
        if starts[-1] + width > vector.shape[-1]:
            name = "state_rotations" if key == "state" else "action_rotations"
            raise UserError(
                f"data.{name} says that dimensions {starts[-1]} to {starts[-1] + width - 1} (counted from 0) are a "
                f"rotation as {self.form}, but `{key}` has {vector.shape[-1]} numbers"
            )
        return _replaced(vector, starts, width, lambda x: matrix_to_6d(to_matrix(x, self.form)))

    def _decode(self, key: str, vector: _Vector, starts: tuple[int, ...]) -> _Vector:
        grown = 6 - numbers_of(self.form)
        moved = tuple(start + i * grown for i, start in enumerate(starts))
        return _replaced(vector, moved, 6, lambda x: from_matrix(matrix_from_6d(x), self.form))


@dataclass(frozen=True)
class RelativeRotations(Transform):
    """Train on rotations relative to the state's rotation: R_state^T R_action.

    For 6D rotations in the same dimensions of state and action. Unlike subtraction, composition yields a rotation.
    """

    batched: ClassVar[bool] = True

    starts: tuple[int, ...]
    """First dimension of each 6D rotation, ascending."""

    def __call__(self, sample: Sample) -> Sample:
        """Make the rotations of actions [H, D] relative to `state`; a no-op without actions."""
        return self._turned(sample, lambda state, action: np.swapaxes(state, -1, -2) @ action)

    def inverse(self, sample: Sample) -> Sample:
        """Compose with the state's rotation again."""
        return self._turned(sample, lambda state, action: state @ action)

    def _turned(self, sample: Sample, compose: Callable[[_Vector, _Vector], _Vector]) -> Sample:
        if "actions" not in sample:
            return sample
        actions = sample["actions"]
        for start in self.starts:
            state = matrix_from_6d(sample["state"][..., np.newaxis, start : start + 6])
            turned = compose(state, matrix_from_6d(actions[..., start : start + 6]))
            numbers = matrix_to_6d(turned)
            actions = np.concatenate([actions[..., :start], numbers, actions[..., start + 6 :]], axis=-1)
        return {**sample, "actions": actions}


@dataclass(frozen=True)
class RelativePoses(Transform):
    """Train on poses relative to the state's pose, in its frame: T_state^-1 T_action, as rigid transforms compose.

    A pose is a position and a 6D rotation, nine numbers in the same dimensions of state and action. The position
    becomes R_state^T (p_action - p_state): the displacement as the tool sees it, not along the axes of the base.
    """

    batched: ClassVar[bool] = True

    starts: tuple[int, ...]
    """First dimension of each position, ascending; its 6D rotation follows."""

    def __call__(self, sample: Sample) -> Sample:
        """Make the poses of actions [H, D] relative to `state`; a no-op without actions."""
        return self._moved(sample, _into_frame)

    def inverse(self, sample: Sample) -> Sample:
        """Compose with the state's pose again."""
        return self._moved(sample, _out_of_frame)

    def _moved(self, sample: Sample, change: Callable[..., tuple[_Vector, _Vector]]) -> Sample:
        if "actions" not in sample:
            return sample
        actions, state = sample["actions"], sample["state"][..., np.newaxis, :]
        for start in self.starts:
            middle, end = start + 3, start + 9
            if end > min(actions.shape[-1], state.shape[-1]):
                raise UserError(
                    f"dimensions {start} to {end - 1} (counted from 0) are a pose, but the action has "
                    f"{actions.shape[-1]} numbers and the state {state.shape[-1]}: correct data.action_rotations"
                )
            position, rotation = change(
                state[..., start:middle],
                matrix_from_6d(state[..., middle:end]),
                actions[..., start:middle],
                matrix_from_6d(actions[..., middle:end]),
            )
            numbers = matrix_to_6d(rotation)
            actions = np.concatenate([actions[..., :start], position, numbers, actions[..., end:]], axis=-1)
        return {**sample, "actions": actions}


def _into_frame(origin: _Vector, frame: _Vector, position: _Vector, rotation: _Vector) -> tuple[_Vector, _Vector]:
    inverse = np.swapaxes(frame, -1, -2)
    return (inverse @ (position - origin)[..., np.newaxis])[..., 0], inverse @ rotation


def _out_of_frame(origin: _Vector, frame: _Vector, position: _Vector, rotation: _Vector) -> tuple[_Vector, _Vector]:
    return (frame @ position[..., np.newaxis])[..., 0] + origin, frame @ rotation


@dataclass(frozen=True)
class NormalForm(Transform):
    """Repack with `repack`, then bring every rotation to the canonical form that inverting `RotationsTo6D` returns.

    A rotation has several representations: an angle and the angle plus 2 pi, a quaternion and its negative. Predictions
    can be compared with recorded actions only if both use the same one.
    """

    batched: ClassVar[bool] = True

    repack: Transform
    form: RotationFormat
    state: tuple[int, ...]
    actions: tuple[int, ...]

    def __call__(self, sample: Row) -> Sample:
        """Row -> sample, with the widths that `repack` gives it."""
        turn = RotationsTo6D(self.form, self.state, self.actions)
        return turn.inverse(turn(self.repack(sample)))


def numbers_of(form: str) -> int:
    """How many numbers represent a rotation in this format."""
    if form == "rotation_6d":
        return 6
    return 4 if form.startswith("quaternion") else 3


def to_matrix(rotation: _Vector, form: str) -> _Vector:
    """[..., 3, 4 or 6] -> rotation matrices [..., 3, 3] in float64. Quaternions need not be normalised."""
    rotation = np.asarray(rotation, np.float64)
    if form == "rotation_6d":
        return matrix_from_6d(rotation)
    if form == "axis_angle":
        return _of_quaternion(_axis_angle_to_quaternion(rotation))
    if form.startswith("quaternion"):
        return _of_quaternion(rotation if form.endswith("wxyz") else np.roll(rotation, 1, axis=-1))
    first, second, third = (_about(axis, rotation[..., i]) for i, axis in enumerate(_axes(form)))
    return first @ second @ third if form[-1].isupper() else third @ second @ first


def from_matrix(matrix: _Vector, form: str) -> _Vector:
    """[..., 3, 3] -> [..., 3, 4 or 6], in canonical form.

    Angles are in -pi..pi, the middle one in -pi/2..pi/2, an axis-angle vector is at most pi long, a quaternion has
    w >= 0. In gimbal lock only the sum (or difference) of the outer angles is defined; the last intrinsic one is 0.
    """
    if form == "rotation_6d":
        return matrix_to_6d(matrix)
    if form == "axis_angle":
        return _quaternion_to_axis_angle(_to_quaternion(matrix))
    if form.startswith("quaternion"):
        quaternion = _to_quaternion(matrix)
        return quaternion if form.endswith("wxyz") else np.roll(quaternion, -1, axis=-1)
    axes = _axes(form)
    # Extrinsic rotations are intrinsic ones in the reverse order.
    angles = _to_intrinsic(matrix, axes if form[-1].isupper() else axes[::-1])
    return angles if form[-1].isupper() else angles[..., ::-1]


def matrix_to_6d(matrix: _Vector) -> _Vector:
    """[..., 3, 3] -> [..., 6], the first two columns."""
    return np.concatenate([matrix[..., :, 0], matrix[..., :, 1]], axis=-1)


def matrix_from_6d(numbers: _Vector) -> _Vector:
    """[..., 6] -> [..., 3, 3] by Gram-Schmidt; degenerate directions are replaced by coordinate axes."""
    numbers = np.asarray(numbers, np.float64)
    first = _direction(numbers[..., :3], np.broadcast_to([1.0, 0.0, 0.0], numbers[..., :3].shape))
    rest = numbers[..., 3:] - first * np.sum(first * numbers[..., 3:], axis=-1, keepdims=True)
    # If the second is parallel to the first, use the coordinate axis that is least aligned with it.
    axis = np.eye(3)[np.argmin(np.abs(first), axis=-1)]
    second = _direction(rest, _direction(axis - first * np.sum(first * axis, axis=-1, keepdims=True), axis))
    return np.stack([first, second, np.cross(first, second)], axis=-1)


def _direction(vector: _Vector, otherwise: _Vector) -> _Vector:
    length = np.linalg.norm(vector, axis=-1, keepdims=True)
    known = length > _DEGENERATE
    return np.where(known, vector / np.where(known, length, 1.0), otherwise)


def _axes(form: str) -> tuple[int, ...]:
    return tuple("xyz".index(letter) for letter in form.removeprefix("euler_").lower())


def _about(axis: int, angle: _Vector) -> _Vector:
    """Rotation matrices [..., 3, 3] about a coordinate axis."""
    one, two = (axis + 1) % 3, (axis + 2) % 3
    matrix = np.zeros((*angle.shape, 3, 3))
    matrix[..., axis, axis] = 1.0
    matrix[..., one, one] = matrix[..., two, two] = np.cos(angle)
    matrix[..., two, one], matrix[..., one, two] = np.sin(angle), -np.sin(angle)
    return matrix


def _to_intrinsic(matrix: _Vector, axes: tuple[int, ...]) -> _Vector:
    """Intrinsic angles [..., 3] about the axes i, j, k in this order, all different."""
    i, j, k = axes
    sign = 1.0 if (j - i) % 3 == 1 else -1.0
    # R = R_i(a) R_j(b) R_k(c): column k gives a and b. Row j of R_i(-a) R is that of R_k(c) for any a: c computed
    # from it compensates for an ill-determined a near gimbal lock.
    cosine = np.hypot(matrix[..., i, i], matrix[..., i, j])
    middle = np.arctan2(sign * matrix[..., i, k], cosine)
    locked = cosine < _GIMBAL_LOCK
    first = np.where(
        locked,
        np.arctan2(sign * matrix[..., k, j], matrix[..., j, j]),
        np.arctan2(-sign * matrix[..., j, k], matrix[..., k, k]),
    )
    sine, cosine = sign * np.sin(first), np.cos(first)
    last = np.arctan2(
        sign * (cosine * matrix[..., j, i] + sine * matrix[..., k, i]),
        cosine * matrix[..., j, j] + sine * matrix[..., k, j],
    )
    return np.stack([first, middle, last], axis=-1)


def _of_quaternion(quaternion: _Vector) -> _Vector:
    """w, x, y, z -> [..., 3, 3]."""
    w, x, y, z = np.moveaxis(_direction(quaternion, np.broadcast_to([1.0, 0, 0, 0], quaternion.shape)), -1, 0)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)


def _to_quaternion(matrix: _Vector) -> _Vector:
    """[..., 3, 3] -> w, x, y, z with w >= 0.

    Each row of `table` is the quaternion times four times one of its components; the longest is numerically stable
    (Shepperd).
    """
    m = np.moveaxis(matrix, (-2, -1), (0, 1))
    trace = m[0, 0] + m[1, 1] + m[2, 2]
    antisymmetric = [m[2, 1] - m[1, 2], m[0, 2] - m[2, 0], m[1, 0] - m[0, 1]]
    table = [[1 + trace, *antisymmetric]]
    for i in range(3):
        row = [antisymmetric[i], *(m[i, j] + m[j, i] for j in range(3))]
        row[1 + i] = 1 + 2 * m[i, i] - trace
        table.append(row)
    candidates = np.stack([np.stack(row, axis=-1) for row in table], axis=-2)
    best = np.argmax(np.linalg.norm(candidates, axis=-1), axis=-1)
    longest = np.take_along_axis(candidates, best[..., np.newaxis, np.newaxis], axis=-2)[..., 0, :]
    unit: _Vector = longest / np.linalg.norm(longest, axis=-1, keepdims=True)
    return np.where(unit[..., :1] < 0, -unit, unit)


def _axis_angle_to_quaternion(vector: _Vector) -> _Vector:
    half = np.linalg.norm(vector, axis=-1, keepdims=True) / 2
    # np.sinc gives sin(half) / half without dividing by zero.
    return np.concatenate([np.cos(half), vector * np.sinc(half / np.pi) / 2], axis=-1)


def _quaternion_to_axis_angle(quaternion: _Vector) -> _Vector:
    length = np.linalg.norm(quaternion[..., 1:], axis=-1, keepdims=True)
    half = np.arctan2(length, quaternion[..., :1])
    vector: _Vector = quaternion[..., 1:] * 2 / np.sinc(half / np.pi)
    return vector


def _replaced(vector: _Vector, starts: tuple[int, ...], width: int, change: Callable[..., _Vector]) -> _Vector:
    """Replace the `width` numbers at each start of a vector [..., D] by `change` of them."""
    pieces, at = [], 0
    for start in starts:
        pieces += [vector[..., at:start], change(vector[..., start : start + width])]
        at = start + width
    return np.concatenate([*pieces, vector[..., at:]], axis=-1)
