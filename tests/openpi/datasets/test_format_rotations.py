"""Formats of datasets whose poses hold rotations: what is refused, and that actions come back."""

import numpy as np
import pytest
from format_rows import EULER, HORIZON, SIX, numbers, there_and_back, transformed, wrong

from rlinf_plugins_openpi.datasets.custom import Pi0CustomConfig, Pi05CustomConfig


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (SIX, "needs rotation_format and action_rotations"),
        (SIX | {"rotation_format": "rpy", "action_rotations": (3,)}, "euler_xyz"),
        (SIX | {"rotation_format": "euler_xyz", "action_rotations": (0, 2)}, "action_rotations overlap"),
        (
            SIX | {"rotation_format": "quaternion_wxyz", "action_rotations": (4,), "action_width": 7},
            "reach number 7, there are 7",
        ),
    ],
)
def test_rotations_that_make_no_sense_are_refused(fields, message):
    assert message in wrong(Pi05CustomConfig, raw_action_is_delta=True, **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"raw_action_is_delta": False, "gripper": (4,)}, "gripper names 4, which action_rotations says"),
        ({"relative": (True,) * 4}, "the same for all numbers of the rotation at 3"),
        ({"relative": (True,) * 6, "state_rotations": ()}, "state_rotations and action_rotations to be equal"),
    ],
)
def test_relative_rotations_that_make_no_sense_are_refused(fields, message):
    assert message in wrong(Pi05CustomConfig, **EULER | fields)


RELATIVE = [
    {"raw_action_is_delta": True},
    {"raw_action_is_delta": False, "gripper": (6,)},
    {"relative": (True,) * 6},
    {"relative": (True,) * 3},
    {"relative": (False,) * 3 + (True,) * 4},
    {"relative": (True,) * 7, "padded_width": 32, "action_width": 7},
]


@pytest.mark.parametrize("fields", RELATIVE, ids=str)
def test_rotations_in_six_numbers_come_back_however_actions_are_trained(fields):
    dataset = Pi0CustomConfig(**EULER | fields)
    encoded, back = there_and_back(dataset, numbers(dataset))
    assert encoded["action_width"] == 10
    assert np.allclose(back, dataset.repack()(numbers(dataset))["actions"], atol=1e-5)


def test_two_arms_with_quaternions_and_a_gripper_each():
    places = (3, 11)
    dataset = Pi05CustomConfig(
        **SIX | {"rotation_format": "quaternion_xyzw", "state_rotations": places, "action_rotations": places},
        raw_action_is_delta=False,
        gripper=(7, 15),
    )
    row = numbers(dataset, width=16)
    target, sample = dataset.repack()(row), transformed(dataset, row)
    assert sample["actions"].shape == (HORIZON, 20)
    assert np.allclose(sample["actions"][:, [9, 19]], row["actions"][:, [7, 15]])
    assert np.allclose(sample["actions"][:, :3], row["actions"][:, :3] - row["state"][:3])
    assert np.allclose(there_and_back(dataset, row)[1], target["actions"], atol=1e-5)
