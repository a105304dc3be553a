"""The policies' and datasets' tables: defaults, what they refuse, and what they import."""

import json
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from rlinf_core import UserError
from rlinf_plugins_openpi import Pi0Config, Pi0DatasetConfig, Pi05Config, Pi05DatasetConfig
from rlinf_plugins_openpi.datasets.libero import Pi0LiberoConfig
from rlinf_plugins_openpi.datasets.metaworld import Pi05MetaworldConfig
from rlinf_plugins_openpi.model.dimensions import VARIANTS

PYPROJECT = Path(__file__).parents[2] / "rlinf_plugins_openpi" / "pyproject.toml"
DATASETS = tomllib.loads(PYPROJECT.read_text())["project"]["entry-points"]["rlinf.datasets"]
CAMERAS = {"base_0_rgb": "observation.image"}


def load(entry_point):
    module, name = entry_point.split(":")
    return getattr(import_module(module), name)


def test_full_size_needs_weights_and_a_tokenizer():
    with pytest.raises(ValidationError, match=r'policy\.weights.*"random"'):
        Pi05Config(tokenizer="tokenizer.model")
    with pytest.raises(ValidationError, match=r"policy\.tokenizer.*tokenizer\.model"):
        Pi05Config(weights="random")
    assert Pi05Config(weights="random", tokenizer="tokenizer.model").variant == "base"


def test_dummy_needs_neither():
    assert [type(step).__name__ for step in Pi05Config(variant="dummy").transforms()] == [
        "ResizeWithPad",
        "TokenizePrompt",
        "PadToActionDim",
    ]


def test_build_makes_a_model_that_takes_what_collate_makes():
    policy = Pi05Config(variant="dummy", action_horizon=2, action_dim=6)
    rng = np.random.default_rng(0)
    sample = {"images": {}, "state": np.zeros(4), "actions": np.zeros((2, 4)), "prompt": "lift"}
    for transform in policy.transforms():
        sample = transform(sample)
    batch = policy.collate([{**sample, **policy.draw(rng)}] * 2)
    model = policy.build()
    for name, parameter in model.named_parameters():
        parameter.data = model.initial_value(name, tuple(parameter.shape), torch.Generator().manual_seed(0))
    output = model(batch)
    assert float(output.weight) == 4
    assert torch.isfinite(output.loss_sum)


def test_tokenizer_larger_than_the_embedding_is_refused(monkeypatch):
    monkeypatch.setitem(VARIANTS, "dummy", VARIANTS["dummy"]._replace(vocab_size=511))
    with pytest.raises(UserError, match=r"512 entries.*511.*policy\.tokenizer"):
        Pi05Config(variant="dummy").build()


def test_full_size_dimensions_are_the_published_ones():
    dimensions = Pi0Config(weights="random", tokenizer="tokenizer.model").dimensions
    assert (dimensions.vocab_size, dimensions.action_dim, dimensions.vlm.width) == (257_152, 32, 2048)


def test_formats_of_the_two_policies():
    pi0, pi05 = Pi0Config(variant="dummy"), Pi05Config(variant="dummy")
    assert (pi0.normalization, pi0.max_token_len, pi0.discrete_state_input) == ("mean_std", 48, False)
    assert (pi05.normalization, pi05.max_token_len, pi05.discrete_state_input) == ("quantile", 200, True)
    assert not pi0.dimensions.pi05
    assert pi05.dimensions.pi05


def test_discrete_state_stands_in_the_prompt():
    sample = {"state": np.zeros(4), "prompt": "lift"}
    with_state, without = (
        int(Pi05Config(variant="dummy", discrete_state_input=flag).transforms()[1](sample)["token_mask"].sum())
        for flag in (True, False)
    )
    assert with_state > without + 4


def test_draws_follow_the_generator_and_the_config():
    policy = Pi05Config(variant="dummy", action_horizon=3, action_dim=5)
    first, again, other = (policy.draw(np.random.Generator(np.random.Philox(key))) for key in (1, 1, 2))
    assert first["noise"].shape == (3, 5)
    assert first["noise"].dtype == first["time"].dtype == np.float32
    assert np.array_equal(first["noise"], again["noise"])
    assert first["time"] == again["time"] != other["time"]


@pytest.mark.parametrize("name", DATASETS)
def test_registered_dataset_sets_up_its_policy(name):
    settings = {"raw_action_is_delta": True} if name.endswith("custom") else {}
    dataset = load(DATASETS[name])(config_name=name, **settings)
    policy = dataset.run_defaults["policy"]
    assert policy["type"] == name.partition("_")[0]
    config = {"pi0": Pi0Config, "pi05": Pi05Config}[policy["type"]](variant="dummy", **policy)
    assert config.chunk_length() == policy["action_horizon"]
    assert type(dataset).model_validate(json.loads(dataset.model_dump_json())) == dataset


def test_dataset_of_ones_own_needs_only_facts():
    class FrankaPick(Pi05DatasetConfig):
        images: dict[str, str] = {**CAMERAS, "left_wrist_0_rgb": "observation.images.wrist"}
        action_width: int = 7
        relative: tuple[bool, ...] = (True,) * 6

    row = {
        "observation.image": np.zeros((4, 4, 3), np.uint8),
        "observation.images.wrist": np.ones((4, 4, 3), np.uint8),
        "observation.state": np.arange(7.0),
        "action": np.full((2, 7), 10.0),
        "action_is_pad": np.zeros(2, bool),
        "task": "pick",
    }
    dataset = FrankaPick()
    sample = dataset.repack()(row)
    for transform in dataset.transforms():
        sample = transform(sample)
    assert sample["actions"].tolist() == [[10, 9, 8, 7, 6, 5, 10]] * 2
    predicted = {"state": sample["state"], "actions": np.pad(sample["actions"], [(0, 0), (0, 25)])}
    for transform in reversed(dataset.transforms()):
        predicted = transform.inverse(predicted)
    assert predicted["actions"].tolist() == [[10.0] * 7] * 2


def test_columns_may_be_set_without_a_class():
    dataset = Pi0DatasetConfig(images=CAMERAS, state=("a", "b"), actions=("c",), raw_action_is_delta=True)
    assert (dataset.run_defaults, dataset.transforms()) == ({"policy": {"type": "pi0"}}, ())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "images is empty"),
        ({"images": {"front": "x"}}, "no camera front.*base_0_rgb"),
        ({"images": CAMERAS, "state": (), "relative": (True,)}, "relative actions need a state"),
        ({"images": CAMERAS}, "how are actions trained.*raw_action_is_delta = true.*gripper.*relative"),
        ({"images": CAMERAS, "action_width": 2, "relative": (True,) * 3}, "3 entries, an action has 2"),
        ({"images": CAMERAS, "camera": "x"}, "camera"),
    ],
)
def test_dataset_refuses(fields, message):
    with pytest.raises(ValidationError, match=message):
        Pi05DatasetConfig(**fields)


def test_metaworld_has_one_camera_and_libero_two():
    assert list(Pi05MetaworldConfig().images) == ["base_0_rgb"]
    assert list(Pi0LiberoConfig().images) == ["base_0_rgb", "left_wrist_0_rgb"]


@pytest.mark.parametrize(
    "module",
    [
        *("rlinf_plugins_openpi", "rlinf_plugins_openpi.config", "rlinf_plugins_openpi.plugin"),
        *(
            "rlinf_plugins_openpi.settings",
            "rlinf_plugins_openpi.datasets.config",
            "rlinf_plugins_openpi.inputs.transforms",
            "rlinf_plugins_openpi.inputs.tokenizer",
        ),
    ],
)
def test_import_leaves_torch_unloaded(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'lerobot' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_registered_datasets_leave_torch_unloaded():
    modules = ", ".join(sorted({entry.partition(":")[0] for entry in DATASETS.values()}))
    subprocess.run([sys.executable, "-c", f"import sys, {modules}; sys.exit('torch' in sys.modules)"], check=True)


def test_importing_the_package_leaves_pydantic_unloaded():
    code = "import sys, rlinf_plugins_openpi; sys.exit('pydantic' in sys.modules or 'numpy' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
