"""The formats under RLinf's own names: their facts, and the numbers that the network sees, by hand and by SciPy."""

from importlib.metadata import entry_points

import numpy as np
import pytest
from distributions import repository_plugins
from format_rows import there_and_back, transformed, wrong
from scipy.spatial.transform import Rotation

from rlinf_core import UserError
from rlinf_core.data.normalize import NormStats
from rlinf_core.data.pipeline import build_pipeline
from rlinf_plugins_openpi import Pi0Config, Pi05Config
from rlinf_plugins_openpi.datasets.custom import Pi05CustomConfig
from rlinf_plugins_openpi.datasets.franka import Pi05DualFrankaConfig, Pi05FrankaConfig, Pi05FrankaStateConfig
from rlinf_plugins_openpi.datasets.isaaclab import Pi05IsaaclabStackCubeConfig

FACTS = {
    # RLinf's name: (action horizon, tokens of the prompt, state in the prompt, cameras, width of the robot's action)
    "pi0_libero": (50, 48, False, 2, 7),
    "pi0_libero_horizon10": (10, 48, False, 2, 7),
    "pi05_libero": (10, 200, False, 2, 7),
    "pi0_maniskill": (50, 48, False, 1, 7),
    "pi05_maniskill": (10, 200, False, 1, 7),
    "pi05_rlt_maniskill_joint": (10, 200, True, 2, 8),
    "pi05_franka": (8, 200, False, 1, 6),
    "pi05_franka_state": (20, 200, True, 1, 7),
    "pi05_franka_pnp": (5, 200, False, 2, 7),
    "pi05_maniskill_sim_real_co_training": (8, 200, False, 1, 7),
    "pi0_metaworld": (5, 48, False, 1, 4),
    "pi05_metaworld": (5, 200, False, 1, 4),
    "pi0_calvin": (5, 48, False, 2, 7),
    "pi05_calvin": (5, 200, False, 2, 7),
    "pi0_robocasa_human": (5, 48, False, 2, 12),
    "pi0_robocasa365_pretrain_human300": (50, 96, False, 2, 12),
    "pi05_robocasa365_pretrain_human300": (50, 200, True, 2, 12),
    "pi0_aloha_robotwin": (50, 48, False, 3, 14),
    "pi05_aloha_robotwin": (50, 200, True, 3, 14),
    "pi05_gsenv": (5, 200, False, 1, 7),
    "pi0_realworld": (10, 48, False, 2, 7),
    "pi05_isaaclab_stack_cube": (10, 200, False, 2, 7),
    "pi05_dualfranka_tcp_rot6d": (20, 200, False, 3, 20),
    "pi0_droid_polaris": (10, 48, False, 2, 8),
    "pi05_droid_polaris": (15, 200, True, 2, 8),
}


def format_of(name):
    (entry,) = entry_points(group="rlinf.datasets", name=name)
    return entry.load()


def own_policy(dataset):
    settings = dict(dataset.run_defaults["policy"])
    return {"pi0": Pi0Config, "pi05": Pi05Config}[settings.pop("type")](variant="dummy", **settings)


@pytest.mark.parametrize("name", FACTS)
def test_facts_are_rlinfs(name):
    dataset = format_of(name)()
    policy = own_policy(dataset)
    assert policy.type == name.partition("_")[0]
    cameras, width = len(dataset.images), dataset.action_width
    assert FACTS[name] == (*(policy.action_horizon, policy.max_token_len, policy.discrete_state_input, cameras, width),)


@pytest.mark.parametrize("name", FACTS)
def test_actions_come_back_in_the_robots_units(name):
    dataset = format_of(name)()
    row = row_of(dataset)
    back = there_and_back(dataset, row)[1]
    assert back.shape == row_actions(dataset, row).shape
    assert np.allclose(back, dataset.repack()(row)["actions"], atol=1e-4)


def row_of(dataset, horizon=4):
    """Numbers of the format's widths; several columns share the width."""
    rng = np.random.default_rng(5)
    row = {"task": "pick"}
    for columns, whole, shape in ((dataset.state, dataset.state_width or 9, ()), (dataset.actions, None, (horizon,))):
        total = whole or dataset.action_width
        widths = [total - (len(columns) - 1), *[1] * (len(columns) - 1)]
        row |= {c: rng.uniform(0.1, 0.9, (*shape, width)) for c, width in zip(columns, widths, strict=True)}
    if dataset.config_name == "" and type(dataset) is Pi05IsaaclabStackCubeConfig:
        row["action"][:, 6] = [1, -1, -1, 1]
    return row | {f"{dataset.actions[0]}_is_pad": np.zeros(horizon, bool)}


def row_actions(dataset, row):
    return np.concatenate([row[column] for column in dataset.actions], axis=-1)


def rigid(position, six):
    """A rigid transform as a 4 x 4 matrix from a position and the first two columns of a rotation, by SciPy."""
    first, second = np.split(np.asarray(six), 2)
    matrix = np.eye(4)
    first = first / np.linalg.norm(first)
    second = second - first * (first @ second)
    second /= np.linalg.norm(second)
    matrix[:3, :3] = Rotation.from_matrix(np.stack([first, second, np.cross(first, second)], axis=1)).as_matrix()
    matrix[:3, 3] = position
    return matrix


def test_dual_franka_sees_poses_in_the_frame_of_its_state():
    dataset = Pi05DualFrankaConfig()
    row = row_of(dataset)
    state, sample = row["state"], transformed(dataset, row)
    seen = sample["state"]
    # Recorded: both grippers, then the left and the right pose. Seen: each pose with its gripper behind it.
    assert np.allclose(seen[[9, 19]], state[[0, 1]])
    assert np.allclose(seen[[0, 1, 2, 10, 11, 12]], state[[2, 3, 4, 11, 12, 13]])
    assert seen.shape == (32,)
    assert not seen[20:].any()
    for step, action in enumerate(row["actions"]):
        for at, recorded in ((0, 2), (10, 11)):
            here = rigid(state[recorded : recorded + 3], state[recorded + 3 : recorded + 9])
            expected = np.linalg.inv(here) @ rigid(action[at : at + 3], action[at + 3 : at + 9])
            assert np.allclose(sample["actions"][step, at : at + 3], expected[:3, 3], atol=1e-6)
            assert np.allclose(sample["actions"][step, at + 3 : at + 9], expected[:3, :2].T.ravel(), atol=1e-6)
        assert np.allclose(sample["actions"][step, [9, 19]], action[[9, 19]])


def test_a_longer_state_is_cut_to_the_numbers_that_are_named():
    dataset = Pi05DualFrankaConfig()
    row = row_of(dataset)
    wide = row | {"state": np.concatenate([row["state"], np.full(48, 7.0)])}
    assert np.array_equal(transformed(dataset, wide)["state"], transformed(dataset, row)["state"])
    with pytest.raises(UserError, match=r"data\.state_order names number 19 of the state .*, which has 14 numbers"):
        dataset.repack()(row | {"state": row["state"][:14]})


def test_padding_of_quantiles_is_minus_one_and_the_prompt_has_the_state_unpadded():
    for cls, width in ((Pi05FrankaConfig, 9), (Pi05FrankaStateConfig, 9)):
        dataset = cls()
        sample = transformed(dataset, row_of(dataset))
        assert sample["actions"].shape == (4, 32)
        assert sample["state"].shape == ((32,) if dataset.pad_state else (width,))
        zeros = {key: np.zeros(sample[key].shape[-1]) for key in ("state", "actions")}
        used = {key: np.arange(len(zero)) < 7 for key, zero in zeros.items()}
        stats = {key: NormStats(zeros[key], used[key] * 1.0, -1.0 * used[key], 1.0 * used[key]) for key in zeros}
        encoded = build_pipeline(dataset, own_policy(dataset), stats).encode(row_of(dataset))
        assert np.allclose(encoded["actions"][:, 7:], -1)
        assert encoded["actions"].shape[-1] == 32


def test_isaac_labs_gripper_has_two_commands():
    dataset = Pi05IsaaclabStackCubeConfig()
    row = row_of(dataset)
    encoded = transformed(dataset, row)
    assert np.array_equal(encoded["actions"], row["action"])
    assert encoded["prompt"].startswith("Stack the red block")
    predicted = row["action"] * 0.3
    for step in reversed(dataset.transforms()):
        predicted = step.inverse({"actions": predicted, "state": row["observation.state"]})["actions"]
    assert predicted[:, 6].tolist() == [1, -1, -1, 1]
    assert np.allclose(predicted[:, :6], row["action"][:, :6] * 0.3)


POSES = {
    "raw_action_is_delta": False,
    "gripper": (9,),
    "action_train_with_rotation_6d": True,
    "rotation_format": "euler_xyz",
    "state_rotations": (3,),
    "action_rotations": (3,),
    "relative_poses": True,
}


def test_poses_may_be_recorded_in_any_format_and_named_by_a_mask():
    fields = POSES | {"raw_action_is_delta": None, "gripper": None, "relative": (True,) * 6}
    for dataset in (Pi05CustomConfig(**fields), Pi05CustomConfig(**POSES | {"gripper": (6,)})):
        rng = np.random.default_rng(1)
        row = {"state": rng.uniform(0.1, 0.9, 7), "actions": rng.uniform(0.1, 0.9, (4, 7)), "task": "pick"}
        row["actions_is_pad"] = np.zeros(4, bool)
        sample = transformed(dataset, row)
        turn = Rotation.from_euler("xyz", row["state"][3:6])
        assert np.allclose(sample["actions"][:, :3], turn.inv().apply(row["actions"][:, :3] - row["state"][:3]))
        both = turn.inv() * Rotation.from_euler("xyz", row["actions"][:, 3:6])
        assert np.allclose(sample["actions"][:, 3:6], both.as_matrix()[:, :, 0])
        assert np.allclose(sample["actions"][:, 9], row["actions"][:, 6])
        assert np.allclose(there_and_back(dataset, row)[1], row["actions"], atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"action_rotations": (2,), "state_rotations": (2,)},
            "needs a position of three numbers before the rotation at 2",
        ),
        ({"action_rotations": (3, 8), "state_rotations": (3, 8)}, "before the rotation at 8"),
        ({"gripper": (2,)}, "gripper names 2, of the position of the pose whose rotation is at 3"),
        (
            {"raw_action_is_delta": None, "gripper": None, "relative": (False,) * 3 + (True,) * 3},
            "relative must be the same for all numbers of the pose",
        ),
        ({"raw_action_is_delta": True, "gripper": None}, "no action is relative to the state"),
        ({"action_train_with_rotation_6d": False}, "relative_poses need action_train_with_rotation_6d"),
        ({"state_order": (0, 0)}, "state_order names a number of the state twice"),
        ({"state_order": (0, 1), "state_width": 3}, "state_width = 3, but state_order has 2 entries"),
        ({"pad_state": False}, "pad_state = false needs padded_width"),
    ],
)
def test_poses_and_orders_that_make_no_sense_are_refused(fields, message):
    given = {key: value for key, value in (POSES | fields).items() if value is not None}
    assert message in wrong(Pi05CustomConfig, **given)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("pi0_behavior", "BEHAVIOR-1K is not in LeRobot's layout"),
        ("pi05_behavior", "hook rlinf_open_dataset"),
        ("pi0_fast_libero", "predicts actions as tokens"),
    ],
)
def test_formats_that_are_not_here_are_refused_with_the_reason(name, why):
    with pytest.raises(UserError, match=f"unknown dataset '{name}': .*{why}"):
        repository_plugins().dataset(name)
