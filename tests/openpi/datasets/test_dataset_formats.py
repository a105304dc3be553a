"""Formats of datasets for π0 and π0.5 by their fields: what they do to rows, what they refuse, how they are kept."""

import tomllib
from dataclasses import dataclass

import numpy as np
import pytest
from format_rows import HORIZON, numbers, policy_of, there_and_back, transformed, wrong

from rlinf_core import Sample, UserError
from rlinf_core.config.toml import write_toml
from rlinf_core.data.normalize import NormStats
from rlinf_core.data.pipeline import build_pipeline
from rlinf_core.data.transforms import Transform
from rlinf_plugins_openpi import Pi05DatasetConfig
from rlinf_plugins_openpi.datasets.aloha import AlohaToPi
from rlinf_plugins_openpi.datasets.custom import Pi0CustomConfig, Pi05CustomConfig
from rlinf_plugins_openpi.datasets.libero import Pi0LiberoConfig, Pi05LiberoConfig


class FrankaPick(Pi05DatasetConfig):
    """Franka picking, as the documentation writes it."""

    repo_id: str = "my-lab/franka-pick"
    images: dict[str, str] = {"base_0_rgb": "observation.images.front", "left_wrist_0_rgb": "observation.images.wrist"}
    raw_action_is_delta: bool = False
    gripper: tuple[int, ...] = (6,)


def test_the_documentations_format_is_relative_but_for_the_gripper():
    dataset = FrankaPick()
    row = numbers(dataset)
    sample = transformed(dataset, row)
    assert np.allclose(sample["actions"][:, :6], row["action"][:, :6] - row["observation.state"][:6])
    assert np.array_equal(sample["actions"][:, 6], row["action"][:, 6])
    encoded, back = there_and_back(dataset, row)
    assert encoded["actions"].shape == (HORIZON, 32)
    assert np.allclose(back, row["action"], atol=1e-5)


def test_no_gripper_is_said_by_an_empty_list_and_not_by_silence():
    custom = Pi05CustomConfig(raw_action_is_delta=False, gripper=())
    sample, row = transformed(custom, numbers(custom)), numbers(custom)
    assert np.allclose(sample["actions"], row["actions"] - row["state"])
    assert "needs gripper" in wrong(Pi05CustomConfig, raw_action_is_delta=False)


def test_a_gripper_without_a_counterpart_in_the_state_stays_absolute():
    dataset = FrankaPick()
    row = numbers(dataset) | {"observation.state": np.arange(6.0)}
    assert np.allclose(there_and_back(dataset, row)[1], row["action"], atol=1e-5)
    row["observation.state"] = np.arange(5.0)
    with pytest.raises(UserError, match=r"dimension 5 of the action.*7 numbers and the state 5.*data\.gripper"):
        transformed(dataset, row)


def test_a_gripper_that_is_not_there_is_named():
    with pytest.raises(UserError, match=r"data\.gripper names dimension 6.*0 to 3"):
        transformed(FrankaPick(), numbers(FrankaPick(), width=4))


def test_actions_that_are_displacements_are_used_as_they_are():
    dataset = Pi05CustomConfig(raw_action_is_delta=True)
    row = numbers(dataset)
    assert np.array_equal(transformed(dataset, row)["actions"], row["actions"])


def test_a_mask_is_the_general_form():
    dataset = Pi0CustomConfig(relative=(False, True))
    row = numbers(dataset)
    sample = transformed(dataset, row)["actions"]
    assert np.allclose(sample[:, 1], row["actions"][:, 1] - row["state"][1])
    assert np.array_equal(np.delete(sample, 1, 1), np.delete(row["actions"], 1, 1))


def test_what_is_set_covers_what_the_class_says_and_that_its_parents():
    class Absolute(Pi0LiberoConfig):
        """Overrides its parent's mask."""

        raw_action_is_delta: bool = True

    assert "RelativeActions" in names(Pi0LiberoConfig())
    assert "RelativeActions" not in names(Absolute())
    assert "RelativeActions" in names(Absolute(relative=(True,)))
    assert "RelativeActions" not in names(Pi0LiberoConfig(raw_action_is_delta=True))
    assert "RelativeUnless" in names(Pi0LiberoConfig(raw_action_is_delta=False, gripper=(6,)))
    assert "RelativeUnless" not in names(FrankaPick(raw_action_is_delta=True))
    assert "exclude each other" in wrong(FrankaPick, raw_action_is_delta=False, relative=(True,))
    assert "gripper is for raw_action_is_delta = false" in wrong(FrankaPick, relative=(True,), gripper=(6,))
    said = wrong(Pi05CustomConfig, raw_action_is_delta=True, gripper=(6,))
    assert "leave data.gripper out, or set it to []" in said
    assert "RelativeUnless" not in names(Pi05CustomConfig(raw_action_is_delta=True, gripper=()))


def names(dataset):
    return [type(transform).__name__ for transform in dataset.transforms()]


@pytest.mark.parametrize(
    "dataset",
    [
        *(FrankaPick(), FrankaPick(relative=(True,)), FrankaPick(raw_action_is_delta=True), FrankaPick(gripper=())),
        *(Pi0LiberoConfig(raw_action_is_delta=True), Pi05LiberoConfig(relative=())),
        Pi05CustomConfig(raw_action_is_delta=True, crops={"base_0_rgb": {"height": 2, "width": 3}}, stride=2),
        Pi05CustomConfig(raw_action_is_delta=True, gripper=()),
        Pi0CustomConfig(relative=(), assets={"assets_dir": "assets", "asset_id": "franka"}),
    ],
    ids=lambda dataset: repr(sorted(dataset.model_fields_set)),
)
def test_a_format_that_is_written_reads_as_an_equal_one(dataset):
    again = type(dataset).model_validate(tomllib.loads(write_toml(dataset.model_dump(mode="json", exclude_none=True))))
    assert again == dataset
    assert again.transforms() == dataset.transforms()


def test_everything_wrong_is_said_at_once():
    message = wrong(
        Pi05CustomConfig,
        images={"front": "a", "wrist": "a"},
        crops={"base_0_rgb": {"height": 1, "width": 1}},
        state=("a", "a", ""),
        actions=("a",),
        prompt_from_task=False,
        norm_stats="stats.json",
        assets={"assets_dir": "assets"},
        action_rotations=(3,),
        padded_width=32,
    )
    for part in (
        "images names 'a' 2 times",
        "state names 'a' 2 times",
        "state holds an empty column name",
        "'a' is named in state and in actions",
        "crops names base_0_rgb, which is not in images: front, wrist",
        "prompt_from_task = false needs default_prompt",
        "the policy has no camera front, wrist: name some of base_0_rgb",
        "how are actions trained?",
        "padded_width needs action_width",
        "action_rotations need action_train_with_rotation_6d = true",
        "set norm_stats or assets, not both",
        "assets needs asset_id",
    ):
        assert part in message


def test_filling_up_early_or_late_is_the_same_to_pi0():
    fields = {"relative": (True,) * 9}
    row = numbers(Pi0CustomConfig(relative=()))
    early = Pi0CustomConfig(relative=(True,) * 6, action_width=7, padded_width=32)
    late = Pi0CustomConfig(relative=(True,) * 6)
    seen = []
    for dataset in (early, late):
        sample = transformed(dataset, row)
        stats = {
            key: NormStats(*(np.where(np.arange(sample[key].shape[-1]) < 7, value, 0.0) for value in (0.3, 2, -1, 1)))
            for key in ("state", "actions")
        }
        seen.append(build_pipeline(dataset, policy_of(dataset), stats).encode(row))
    assert "dimension 8" in str(pytest.raises(UserError, transformed, Pi0CustomConfig(**fields), row).value)
    for key in ("state", "actions", "action_width"):
        assert np.array_equal(seen[0][key], seen[1][key])


def test_the_filling_stays_zero_where_actions_are_relative_to_a_wider_state():
    dataset = Pi0CustomConfig(raw_action_is_delta=False, gripper=(6,), action_width=7, padded_width=32)
    row = numbers(dataset) | {"state": np.arange(1.0, 10.0)}
    sample = transformed(dataset, row)
    assert np.allclose(sample["actions"][:, :6], row["actions"][:, :6] - row["state"][:6])
    assert not sample["actions"][:, 7:].any()
    assert np.allclose(there_and_back(dataset, row)[1], row["actions"], atol=1e-5)


def test_a_third_partys_transform_stands_before_ours_and_its_inverse_runs_last():
    @dataclass(frozen=True)
    class Millimetres(Transform):
        """Positions in metres to millimetres."""

        def __call__(self, sample: Sample) -> Sample:
            return {**sample, **{key: sample[key] * 1000.0 for key in ("state", "actions") if key in sample}}

        def inverse(self, sample: Sample) -> Sample:
            return {**sample, **{key: sample[key] / 1000.0 for key in ("state", "actions") if key in sample}}

    class Metric(FrankaPick):
        """With a transform of its own."""

        def transforms(self):
            return (Millimetres(), *super().transforms())

    dataset = Metric()
    row = numbers(dataset)
    sample = transformed(dataset, row)
    assert np.allclose(sample["actions"][:, 0], 1000 * (row["action"][:, 0] - row["observation.state"][0]))
    assert np.allclose(there_and_back(dataset, row)[1], row["action"], atol=1e-5)


def test_aloha_space_comes_back_for_state_and_actions():
    rng = np.random.default_rng(0)
    sample = {"state": rng.uniform(0, 1, 14), "actions": rng.uniform(0, 1, (3, 14)), "prompt": ""}
    transform = AlohaToPi()
    back = transform.inverse(transform(sample))
    assert np.allclose(back["state"], sample["state"], atol=1e-6)
    assert np.allclose(back["actions"], sample["actions"])
    wide = {**sample, "actions": np.pad(sample["actions"], [(0, 0), (0, 18)])}
    assert transform.inverse(wide)["actions"].shape == (3, 32)


def test_numbers_too_few_for_aloha_are_told():
    sample = {"state": np.zeros(14), "actions": np.zeros((3, 7)), "prompt": ""}
    with pytest.raises(UserError, match=r"an action of the dataset has 7 numbers, Aloha's two arms have 14"):
        AlohaToPi()(sample)


PROMPTS = [
    ({}, "pick", "pick"),
    ({"default_prompt": "fold"}, "pick", "pick"),
    ({"default_prompt": "fold"}, "", "fold"),
    ({"default_prompt": "fold"}, None, "fold"),
    ({"default_prompt": "fold", "prompt_from_task": False}, "pick", "fold"),
]


@pytest.mark.parametrize(("fields", "task", "prompt"), PROMPTS)
def test_prompts(fields, task, prompt):
    dataset = Pi05CustomConfig(raw_action_is_delta=True, **fields)
    row = numbers(dataset, task=task)
    if task is None:
        del row["task"]
    assert dataset.repack()(row)["prompt"] == prompt
    if task is not None:
        assert np.atleast_1d(dataset.repack()(row | {"task": [task, "pick"]})["prompt"])[0] == prompt
    assert ("task" in dataset.observation_columns()) == (not fields)
