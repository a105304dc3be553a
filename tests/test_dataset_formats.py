"""Formats of datasets for π0 and π0.5 by their fields: what they do to rows, what they refuse, how they are kept."""

import tomllib
from dataclasses import dataclass

import numpy as np
import pytest
from distributions import repository_plugins
from pydantic import ValidationError

from rlinf_core import Sample, UserError
from rlinf_core.config.load import load_config
from rlinf_core.config.toml import write_toml
from rlinf_core.data.lerobot import open_lerobot
from rlinf_core.data.lerobot_columns import picture_size
from rlinf_core.data.normalize import NormStats, save_norm_stats
from rlinf_core.data.pipeline import build_pipeline
from rlinf_core.data.statistics import compute_norm_stats
from rlinf_core.data.transforms import Transform
from rlinf_core.testing import check_dataset, write_tiny_dataset
from rlinf_core.training.statistics import diagnose
from rlinf_plugins_openpi import Pi0Config, Pi05Config, Pi05DatasetConfig
from rlinf_plugins_openpi.datasets.aloha import AlohaToPi
from rlinf_plugins_openpi.datasets.custom import Pi0CustomConfig, Pi05CustomConfig
from rlinf_plugins_openpi.datasets.libero import Pi0LiberoConfig, Pi05LiberoConfig

FRONT, WRIST = "observation.images.front", "observation.images.wrist"
TINY = {"images": {"base_0_rgb": FRONT}, "state": ["observation.state"], "actions": ["action"]}
HORIZON = 4


class FrankaPick(Pi05DatasetConfig):
    """Franka picking, as the documentation writes it."""

    repo_id: str = "my-lab/franka-pick"
    images: dict[str, str] = {"base_0_rgb": "observation.images.front", "left_wrist_0_rgb": "observation.images.wrist"}
    raw_action_is_delta: bool = False
    gripper: tuple[int, ...] = (6,)


def policy_of(dataset, **settings):
    cls = {"pi0": Pi0Config, "pi05": Pi05Config}[dataset.run_defaults["policy"]["type"]]
    return cls(variant="dummy", **{"action_horizon": HORIZON} | settings)


def numbers(dataset, *, width=7, seed=0, **others):
    """A row without pictures of a dataset with one state and one action column."""
    rng = np.random.default_rng(seed)
    (state,), (action,) = dataset.state, dataset.actions
    row = {state: rng.normal(size=width), action: rng.normal(size=(HORIZON, width)), "task": "pick"}
    return row | {f"{action}_is_pad": np.zeros(HORIZON, bool)} | others


def transformed(dataset, row):
    sample = dataset.repack()(row)
    for transform in dataset.transforms():
        sample = transform(sample)
    return sample


def there_and_back(dataset, row):
    """Through the policy's own transforms too, with statistics of the width that the dataset's transforms make."""
    sample = transformed(dataset, row)
    rng = np.random.default_rng(1)

    def stats(width):
        low = rng.normal(size=width)
        return NormStats(mean=low, std=np.exp(low), q01=low - 1, q99=low + 1)

    found = {key: stats(sample[key].shape[-1]) for key in ("state", "actions")}
    pipeline = build_pipeline(dataset, policy_of(dataset), found)
    encoded = pipeline.encode(row)
    return encoded, pipeline.decode(encoded["actions"], encoded)


def wrong(cls, **fields):
    with pytest.raises(ValidationError) as error:
        cls(**fields)
    return str(error.value)


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
    with pytest.raises(UserError, match=r"number 5 of the action.*7 numbers and the state 5.*data\.gripper"):
        transformed(dataset, row)


def test_a_gripper_that_is_not_there_is_named():
    with pytest.raises(UserError, match=r"data\.gripper names number 6.*0 to 3"):
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
    assert "exclude one another" in wrong(FrankaPick, raw_action_is_delta=False, relative=(True,))
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
        "crops names base_0_rgb, which images does not: front, wrist",
        "prompt_from_task = false needs default_prompt",
        "the policy has no camera front, wrist: name some of base_0_rgb",
        "how are actions trained?",
        "padded_width needs action_width",
        "action_rotations need action_train_with_rotation_6d = true",
        "set norm_stats or assets, not both",
        "assets needs asset_id",
    ):
        assert part in message


SIX = {"action_train_with_rotation_6d": True}


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


EULER = SIX | {"rotation_format": "euler_xyz", "state_rotations": (3,), "action_rotations": (3,)}


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
    assert "number 8" in str(pytest.raises(UserError, transformed, Pi0CustomConfig(**fields), row).value)
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


def tiny(root, **fields):
    return Pi05CustomConfig(repo_id=str(root), **TINY | {"raw_action_is_delta": True} | fields)


def test_a_stride_takes_every_other_frame_and_repeats_the_last(tiny_dataset):
    source = open_lerobot(tiny(tiny_dataset.root, stride=3), HORIZON, "train")
    first, late = source.without_images([0, 5])
    actions = tiny_dataset.actions[0]
    assert np.array_equal(first["action"], actions[[0, 3, 6, 8]])
    assert first["action_is_pad"].tolist() == [False, False, False, True]
    assert np.array_equal(late["action"], actions[[5, 8, 8, 8]])
    plain = open_lerobot(tiny(tiny_dataset.root), HORIZON, "train")
    assert source.fingerprint() != plain.fingerprint()


def test_a_crop_is_what_the_policy_sees(tiny_dataset):
    crop = {"top": 4, "left": 2, "height": 20, "width": 12}
    dataset = tiny(tiny_dataset.root, crops={"base_0_rgb": crop})
    (row,) = open_lerobot(dataset, HORIZON, "train").__getitems__([3])
    assert np.array_equal(dataset.repack()(row)["images"]["base_0_rgb"], row[FRONT][4:24, 2:14])


def test_a_crop_beyond_the_picture_is_refused_before_training_and_by_the_robot(tiny_dataset):
    dataset = tiny(tiny_dataset.root, crops={"base_0_rgb": {"top": 20, "height": 20, "width": 12}})
    with pytest.raises(UserError, match=r"data\.crops\.base_0_rgb reaches row 40 and column 12.*32 rows"):
        open_lerobot(dataset, HORIZON, "train")
    row = numbers(dataset) | {FRONT: np.zeros((32, 32, 3), np.uint8)}
    with pytest.raises(UserError, match=r"data\.crops\.base_0_rgb reaches row 40.*32 rows"):
        dataset.repack()(row)


@pytest.mark.parametrize("shape", [[32, 24, 1], [3, 32, 24], [32, 24, 4], [None, None, 3]], ids=str)
def test_a_crop_is_held_to_the_size_wherever_the_channels_stand(shape):
    assert picture_size({"shape": shape}) == ((32, 24) if shape[0] else None)


def test_a_column_that_is_not_there_is_named_with_those_that_are_nearest_first(tiny_dataset):
    dataset = tiny(tiny_dataset.root, images={"base_0_rgb": "observation.image.front"}, state=["observation.states"])
    with pytest.raises(UserError) as error:
        open_lerobot(dataset, HORIZON, "train")
    picture, state = str(error.value).splitlines()
    assert "data.images.base_0_rgb names 'observation.image.front'" in picture
    assert f"its columns are {FRONT}, " in picture
    assert "its columns are observation.state, " in state


@pytest.mark.parametrize(
    "fields",
    [
        {"raw_action_is_delta": True},
        {"raw_action_is_delta": False, "gripper": [6]},
        {"relative": [True] * 6},
        EULER | {"raw_action_is_delta": False, "gripper": [6]},
        EULER | {"rotation_format": "axis_angle", "raw_action_is_delta": True},
    ],
    ids=lambda fields: "+".join(fields),
)
@pytest.mark.parametrize("cls", [Pi0CustomConfig, Pi05CustomConfig])
def test_formats_of_toml_alone_conform(cls, fields, arm):
    table = {"images": {"base_0_rgb": FRONT, "left_wrist_0_rgb": WRIST}, "state": ["pose"], "actions": ["target"]}
    table = tomllib.loads(write_toml(table | fields))
    report = check_dataset(cls(repo_id=str(arm.root), **table), plugins=repository_plugins(), policy=policy_of(cls))
    assert report.not_checked == ()


@pytest.fixture(scope="session")
def arm(tmp_path_factory):
    """A robot with a pose of seven numbers."""
    return write_tiny_dataset(tmp_path_factory.mktemp("arm") / "data", vectors={"pose": 7, "target": 7})


def test_several_columns_are_one_vector(tmp_path):
    vectors = {"pos": 3, "rot": 3, "hand": 1, "dpos": 3, "drot": 3, "dhand": 1}
    written = write_tiny_dataset(tmp_path / "data", vectors=vectors, lengths=(5,))
    dataset = tiny(written.root, state=["pos", "rot", "hand"], actions=["dpos", "drot", "dhand"])
    (row,) = open_lerobot(dataset, HORIZON, "train").without_images([1])
    sample = dataset.repack()(row)
    assert np.array_equal(sample["state"], np.concatenate([written.vectors[n][0][1] for n in ("pos", "rot", "hand")]))
    assert sample["actions"].shape == (HORIZON, 7)


def test_statistics_are_found_where_openpi_keeps_them(tiny_dataset, tmp_path):
    for repo_id, asset_id, folder in [
        ("my-lab/franka", "", "my-lab/franka"),
        ("my-lab/franka", "franka", "franka"),
        ("my-lab/franka@v3.0", "", "my-lab/franka"),
        (str(tiny_dataset.root), "", tiny_dataset.root.name),
    ]:
        assets = {"assets_dir": str(tmp_path), "asset_id": asset_id}
        dataset = Pi0CustomConfig(relative=(), repo_id=repo_id, assets=assets)
        assert dataset.given_statistics() == str(tmp_path / folder / "norm_stats.json")
    assert Pi0CustomConfig(relative=(), norm_stats="x.json").given_statistics() == "x.json"


def run_of(tmp_path, root, *overrides):
    path = tmp_path / "run.toml"
    table = {"runner": {"name": "run", "output_dir": str(tmp_path), "max_steps": 2, "save_interval": 2}}
    table |= {"data": TINY | {"config_name": "pi0_custom", "repo_id": str(root), "num_workers": 0}}
    table |= {"policy": {"variant": "dummy", "action_horizon": HORIZON, "num_sampling_steps": 1}}
    table |= {"trainer": {"device": "cpu", "global_batch_size": 1, "micro_batch_size": 1}}
    path.write_text(write_toml(table))
    return load_config(path, ["data.raw_action_is_delta=true", *overrides], repository_plugins())


def test_statistics_of_vectors_that_were_filled_up_are_cut_to_the_data(tiny_dataset, tmp_path):
    early = Pi0CustomConfig(
        repo_id=str(tiny_dataset.root), **TINY, raw_action_is_delta=True, action_width=2, padded_width=32
    )
    source = open_lerobot(early, HORIZON, "train")
    wide = compute_norm_stats(source, (early.repack(), *early.transforms()))
    assert len(wide["actions"].mean) == 32
    save_norm_stats(tmp_path / "rlinf" / "norm_stats.json", wide)
    assets = f'data.assets={{assets_dir="{tmp_path}", asset_id="rlinf"}}'
    run = run_of(tmp_path, tiny_dataset.root, assets)
    found = diagnose(run, source).stats
    assert {key: len(stats.mean) for key, stats in found.items()} == {"state": 3, "actions": 2}
    pipeline = build_pipeline(run.data, run.policy, found)
    row = source.__getitems__([2])[0]
    encoded = pipeline.encode(row)
    assert np.allclose(pipeline.decode(encoded["actions"], encoded), row["action"], atol=1e-5)


def test_pi05_libero_is_trained_as_openpi_trains_it(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('[data]\nconfig_name = "pi05_libero"\n')
    run = load_config(path, ["policy.variant=dummy"], repository_plugins())
    optim = run.optim
    assert (optim.lr, optim.min_lr, optim.warmup_steps, optim.decay_steps) == (5e-5, 5e-5, 10_000, 1_000_000)
    assert optim.ema_decay == 0.999
