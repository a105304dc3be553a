"""Formats of datasets for π0 and π0.5 on datasets on disk: strides, crops, columns, statistics, whole runs."""

import tomllib

import numpy as np
import pytest
from distributions import repository_plugins
from format_rows import EULER, FRONT, HORIZON, TINY, WRIST, numbers, policy_of

from rlinf_core import UserError
from rlinf_core.config.load import load_config
from rlinf_core.config.toml import write_toml
from rlinf_core.data.lerobot.columns import image_size
from rlinf_core.data.lerobot.source import open_lerobot
from rlinf_core.data.normalize import save_norm_stats
from rlinf_core.data.pipeline import build_pipeline
from rlinf_core.data.statistics.compute import compute_norm_stats
from rlinf_core.data.statistics.run import diagnose
from rlinf_core.testing import check_dataset, write_tiny_dataset
from rlinf_plugins_openpi.datasets.calvin import Pi0CalvinConfig
from rlinf_plugins_openpi.datasets.custom import Pi0CustomConfig, Pi05CustomConfig
from rlinf_plugins_openpi.datasets.libero import Pi0LiberoConfig
from rlinf_plugins_openpi.datasets.maniskill import Pi0ManiskillConfig, Pi05ManiskillConfig
from rlinf_plugins_openpi.datasets.metaworld import Pi0MetaworldConfig


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
    assert image_size({"shape": shape}) == ((32, 24) if shape[0] else None)


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


@pytest.mark.parametrize("width", [7, 9])
@pytest.mark.parametrize(
    "cls", [Pi0ManiskillConfig, Pi05ManiskillConfig, Pi0LiberoConfig, Pi0MetaworldConfig, Pi0CalvinConfig]
)
def test_a_state_has_any_width_that_the_reference_takes(cls, width):
    """RLinf's and openpi's inputs pass the state on; only their examples have a width."""
    actions = np.zeros((3, cls.model_fields["action_width"].default))
    sample = {"images": {}, "state": np.arange(width, dtype=np.float32), "prompt": "", "actions": actions}
    for step in cls(repo_id="it").transforms():
        sample = step(sample)
    assert sample["state"].tolist() == list(range(width))
