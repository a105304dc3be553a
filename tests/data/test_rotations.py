"""Rotations: every format against SciPy, the 6D representation and its inverse, relative rotations, batches."""

from typing import get_args

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from rlinf_core import UserError
from rlinf_core.data.rotations import (
    NormalForm,
    RelativePoses,
    RelativeRotations,
    RotationFormat,
    RotationsTo6D,
    from_matrix,
    matrix_from_6d,
    matrix_to_6d,
    numbers_of,
    to_matrix,
)
from rlinf_core.data.transforms import Concatenate

FORMS = get_args(RotationFormat)
forms = pytest.mark.parametrize("form", FORMS)


def recorded(rotation, form):
    """SciPy's numbers in one of our forms."""
    if form.startswith("quaternion"):
        return rotation.as_quat(scalar_first=form.endswith("wxyz"))
    if form == "rotation_6d":
        return np.concatenate([rotation.as_matrix()[..., :, 0], rotation.as_matrix()[..., :, 1]], axis=-1)
    return rotation.as_rotvec() if form == "axis_angle" else rotation.as_euler(form.removeprefix("euler_"))


def half_turns():
    """Rotations by exactly and nearly 180 degrees, about many axes."""
    axes = np.concatenate([np.eye(3), Rotation.random(20, rng=1).as_matrix()[:, 0]])
    angles = np.pi + np.array([0, -1e-12, 1e-9, -1e-6, 1e-4])
    return Rotation.from_rotvec((axes[:, None] * angles[:, None]).reshape(-1, 3))


def near_gimbal_lock(form):
    """The middle angle at and around a right angle, in the form's own order of axes."""
    order = form.removeprefix("euler_") if form.startswith("euler") else "xyz"
    middle = np.concatenate([s * np.pi / 2 + np.array([0, 1e-12, -1e-9, 1e-7, -1e-6, 1e-3]) for s in (1, -1)])
    outer = np.linspace(-np.pi, np.pi, 7)
    grid = np.stack(np.meshgrid(outer, middle, outer), axis=-1).reshape(-1, 3)
    return Rotation.from_euler(order, grid)


def rotations_of(form):
    small = Rotation.from_rotvec(Rotation.random(20, rng=2).as_rotvec() * 1e-9)
    parts = [Rotation.random(500, rng=0), half_turns(), near_gimbal_lock(form), small, Rotation.identity(1)]
    return Rotation.concatenate(parts)


@forms
def test_a_form_means_what_scipy_means_by_it(form):
    rotation = Rotation.random(500, rng=0)
    assert np.allclose(to_matrix(recorded(rotation, form), form), rotation.as_matrix(), atol=1e-12)


@forms
def test_any_rotation_comes_back_also_at_half_turns_and_in_gimbal_lock(form):
    matrix = rotations_of(form).as_matrix()
    again = to_matrix(from_matrix(matrix, form), form)
    assert np.abs(again - matrix).max() < 1e-12
    assert np.abs(matrix_from_6d(matrix_to_6d(matrix)) - matrix).max() < 1e-12


@forms
def test_numbers_in_the_promised_range_come_back_themselves(form):
    numbers = from_matrix(Rotation.random(500, rng=3).as_matrix(), form)
    assert np.allclose(from_matrix(to_matrix(numbers, form), form), numbers, atol=1e-9)
    if form.startswith("quaternion"):
        assert (numbers[:, 0 if form.endswith("wxyz") else 3] >= 0).all()
    elif form != "axis_angle":
        assert np.abs(numbers).max() <= np.pi
        assert np.abs(numbers[:, 1]).max() <= np.pi / 2


def test_the_six_numbers_are_the_first_two_columns():
    matrix = Rotation.random(rng=0).as_matrix()
    assert matrix_to_6d(matrix).tolist() == [*matrix[:, 0], *matrix[:, 1]]


def test_six_numbers_do_not_jump_where_angles_do():
    turn = [to_matrix(np.array([0.0, 0.0, angle]), "euler_xyz") for angle in (np.pi - 1e-6, -np.pi + 1e-6)]
    assert np.abs(matrix_to_6d(turn[0]) - matrix_to_6d(turn[1])).max() < 1e-5


def test_whatever_is_predicted_becomes_a_rotation():
    rng = np.random.default_rng(0)
    predicted = np.concatenate([rng.normal(size=(100, 6)), np.zeros((1, 6)), np.ones((1, 6)), np.eye(6)])
    matrix = matrix_from_6d(predicted)
    assert np.allclose(np.swapaxes(matrix, -1, -2) @ matrix, np.eye(3), atol=1e-9)
    assert np.allclose(np.linalg.det(matrix), 1)


def test_gram_schmidt_keeps_the_first_direction_and_the_plane():
    matrix = matrix_from_6d(np.array([2.0, 0, 0, 5.0, 3.0, 0]))
    assert np.allclose(matrix, np.eye(3))


def sample_of(form, rng, *, starts=(3,), width=7, horizon=4):
    """Positions, rotations in their places, a gripper; in float32, as data are."""

    def vector(*axes):
        out = rng.normal(size=(*axes, width))
        for start in starts:
            count = int(np.prod(axes, dtype=int))
            numbers = from_matrix(Rotation.random(count, rng=rng).as_matrix(), form).reshape(*axes, -1)
            out[..., start : start + numbers_of(form)] = numbers
        return out.astype(np.float32)

    return {"state": vector(), "actions": vector(horizon), "prompt": "turn"}


@forms
@pytest.mark.parametrize("arms", [1, 2])
def test_state_and_actions_are_converted_in_place_and_come_back(form, arms):
    each = 4 + numbers_of(form)
    starts = tuple(3 + arm * each for arm in range(arms))
    sample = sample_of(form, np.random.default_rng(0), starts=starts, width=arms * each)
    turn = RotationsTo6D(form, starts, starts)
    converted = turn(sample)
    assert converted["actions"].shape == (4, arms * 10)
    for arm in range(arms):
        gripper = each * (arm + 1) - 1
        assert turn.place(gripper) == 10 * (arm + 1) - 1
        assert np.array_equal(converted["actions"][:, turn.place(gripper)], sample["actions"][:, gripper])
    for key in ("state", "actions"):
        assert np.allclose(turn.inverse(converted)[key], sample[key], atol=1e-5)


@forms
def test_relative_rotations_come_back_and_are_turns_from_the_state(form):
    sample = sample_of(form, np.random.default_rng(1), width=4 + numbers_of(form))
    turn, relative = RotationsTo6D(form, (3,), (3,)), RelativeRotations((3,))
    there = relative(turn(sample))
    state = Rotation.from_matrix(to_matrix(sample["state"][3 : 3 + numbers_of(form)], form))
    action = Rotation.from_matrix(to_matrix(sample["actions"][0, 3 : 3 + numbers_of(form)], form))
    assert np.allclose(matrix_from_6d(there["actions"][0, 3:9]), (state.inv() * action).as_matrix(), atol=1e-6)
    back = turn.inverse(relative.inverse(there))
    assert np.allclose(back["actions"], sample["actions"], atol=1e-5)


def test_an_action_that_stays_at_the_state_is_the_identity():
    sample = sample_of("euler_xyz", np.random.default_rng(2))
    sample["actions"] = np.repeat(sample["state"][None], 4, axis=0)
    there = RelativeRotations((3,))(RotationsTo6D("euler_xyz", (3,), (3,))(sample))
    assert np.allclose(there["actions"][:, 3:9], [1, 0, 0, 0, 1, 0], atol=1e-6)


def test_a_batch_is_converted_as_its_samples_are():
    rng = np.random.default_rng(3)
    samples = [sample_of("quaternion_xyzw", rng, width=8) for _ in range(3)]
    steps = RotationsTo6D("quaternion_xyzw", (3,), (3,)), RelativeRotations((3,))
    batch = {key: np.stack([sample[key] for sample in samples]) for key in ("state", "actions")}
    for step in steps:
        batch, samples = step(batch), [step(sample) for sample in samples]
    for key in ("state", "actions"):
        assert np.allclose(batch[key], [sample[key] for sample in samples])


def test_transforms_take_samples_without_actions_or_state():
    turn = RotationsTo6D("euler_xyz", (3,), (3,))
    state = {"state": np.zeros(7), "prompt": ""}
    assert RelativeRotations((3,))(turn(state))["state"].shape == (10,)
    assert turn({"prompt": "", "actions": np.zeros((2, 7))})["actions"].shape == (2, 10)


def test_a_rotation_beyond_the_vector_is_named():
    with pytest.raises(UserError, match=r"data\.action_rotations.*dimensions 5 to 8.*quaternion_wxyz.*7 numbers"):
        RotationsTo6D("quaternion_wxyz", (), (5,))({"actions": np.zeros((2, 7)), "prompt": ""})


def test_recorded_rotations_are_written_the_way_in_which_they_come_back():
    repack = Concatenate(images={}, state=("state",), actions=("action",))
    normal = NormalForm(repack, "quaternion_wxyz", (0,), (0,))
    quaternion = np.array([-0.5, 0.5, 0.5, 0.5], np.float32)
    row = {"state": quaternion, "action": np.stack([quaternion, -quaternion]), "action_is_pad": np.zeros(2), "task": ""}
    sample = normal(row)
    assert np.allclose(sample["state"], -quaternion)
    assert np.allclose(sample["actions"], [-quaternion, -quaternion])


def test_a_pose_relative_to_the_states_is_the_product_of_rigid_transforms():
    rng = np.random.default_rng(3)
    turns = Rotation.random(5, rng=1)
    poses = np.concatenate([rng.normal(size=(5, 3)), recorded(turns, "rotation_6d")], axis=-1)
    gripper = rng.normal(size=(5, 1))
    rows = np.concatenate([gripper, poses], axis=-1)
    sample = {"state": rows[0], "actions": rows[1:]}
    relative = RelativePoses((1,))
    seen = relative(sample)["actions"]
    assert np.array_equal(seen[:, 0], gripper[1:, 0])
    assert np.allclose(seen[:, 1:4], turns[0].inv().apply(poses[1:, :3] - poses[0, :3]))
    assert np.allclose(seen[:, 4:], recorded(turns[0].inv() * turns[1:], "rotation_6d"))
    assert np.allclose(relative.inverse({"state": rows[0], "actions": seen})["actions"], rows[1:])
    batch = relative({"state": np.stack([rows[0]] * 2), "actions": np.stack([rows[1:]] * 2)})
    assert np.allclose(batch["actions"], seen)
    assert "actions" not in relative({"state": rows[0]})
    with pytest.raises(UserError, match=r"dimensions 2 to 10 .* are a pose, but the action has 10 numbers"):
        RelativePoses((2,))(sample)
