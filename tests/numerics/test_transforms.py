"""Every dataset format against the reference, stage by stage, there and back.

The reference's overrides are named as in RLinf's dataset configs; `OVERRIDES` says what each is among our settings. One
that stands in no line of it fails, and so does a format that is not registered: nothing is skipped.
"""

import json
import tomllib
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from golden import GOLDEN, cases

from rlinf_core.data.normalize import Normalize, load_norm_stats
from rlinf_plugins_openpi import Pi0Config, Pi05Config
from rlinf_plugins_openpi.inputs.collate import stack
from rlinf_plugins_openpi.model.dimensions import CAMERAS

OURS = Path(__file__).parents[1] / "golden"
"""The set in the repository, wherever the one under test lies."""
PYPROJECT = Path(__file__).parents[2] / "rlinf_plugins_openpi" / "pyproject.toml"
DATASETS = tomllib.loads(PYPROJECT.read_text())["project"]["entry-points"]["rlinf.datasets"]
POLICIES = {"pi0": Pi0Config, "pi05": Pi05Config}
TOLERANCE = 1e-6
WITHOUT_REFERENCE = {
    "pi05_custom",
    # Later formats of RLinf, whose numbers tests/openpi/datasets/test_rlinf_formats.py computes by hand and by SciPy.
    *("pi0_droid_polaris", "pi05_droid_polaris", "pi0_libero_horizon10", "pi05_gsenv", "pi05_isaaclab_stack_cube"),
    *("pi0_robocasa_human", "pi0_robocasa365_pretrain_human300", "pi05_robocasa365_pretrain_human300"),
    *("pi05_franka", "pi05_franka_pnp", "pi05_franka_state", "pi05_maniskill_sim_real_co_training"),
    *("pi05_dualfranka_tcp_rot6d", "pi05_rlt_maniskill_joint"),
}


def masked(value, meta):
    """RLinf's flags mean the opposite for its custom format; what they come to stands in `delta_mask`."""
    return {"relative": tuple(meta["delta_mask"] or ())}


def nothing(value, meta):
    return {}


def nested(value, meta):
    return {} if value is None else translated(value, meta)


def not_ours(value, meta):
    """What no setting of ours does may be said only where it is off."""
    if value:
        raise LookupError(f"{meta['config']} has an override that we cannot follow: {value!r}")
    return {}


def under(name):
    """A setting of ours; TOML has no null, so that None is its default."""
    return lambda value, meta: {} if value is None else {name: value}


OVERRIDES = {
    "extra_delta_transform": masked,
    "use_delta_joint_actions": masked,  # openpi's name of it for Aloha
    "adapt_to_pi": under("adapt_to_pi"),
    "default_prompt": under("default_prompt"),
    "prompt_from_task": under("prompt_from_task"),
    "base_config": nested,  # openpi's DataConfig, in which prompt_from_task stands
    "action_train_with_rotation_6d": nothing,  # RLinf hands it on and nobody reads it; ours really converts
    "repo_id": under("repo_id"),
    "assets": nothing,  # where the statistics lie: these tests take those beside the case
    "norm_stats_path": nothing,  # the same in later versions
    "use_direct_resize": not_ours,  # later versions may stretch LIBERO's images, which are square: padding adds nothing
    "action_horizon": under("action_horizon"),
    "action_dim": under("action_dim"),
    "max_token_len": under("max_token_len"),
    "discrete_state_input": under("discrete_state_input"),
}
"""Name of RLinf -> (value, meta) -> our settings."""


def translated(overrides, meta):
    if unknown := overrides.keys() - OVERRIDES.keys():
        raise LookupError(f"say in OVERRIDES what {sorted(unknown)} of {meta['config']} are among our settings")
    settings = {}
    for name, value in overrides.items():
        settings |= OVERRIDES[name](value, meta)
    return settings


def reference_of(meta):
    """What RLinf's class says and ours leaves to the user: pi0_custom states nothing about its actions."""
    if meta["config"] != "pi0_custom":
        return {}
    return {**masked(None, meta), "action_width": 7, "padded_width": 32}


def dataset_class(name):
    module, attribute = DATASETS[name].split(":")
    return getattr(import_module(module), attribute)


class Case:
    """One folder, and our dataset and policy set up as it says, or with other overrides."""

    def __init__(self, folder, **changes):
        self.name = f"{folder.parent.name}/{folder.name}"
        self.meta = json.loads((folder / "meta.json").read_text()) | changes
        self.data = np.load(folder / "data.npz")
        cls = dataset_class(self.meta["config"])
        settings = reference_of(self.meta) | translated(self.meta["overrides"], self.meta)
        self.dataset = cls(**{key: value for key, value in settings.items() if key in cls.model_fields})
        prompts = (GOLDEN if (GOLDEN / "tokenizer").is_dir() else OURS) / "tokenizer"
        tokenizer = prompts / json.loads((prompts / "tokenizer_cases.json").read_text())["sp_model"]
        policy = cls.run_defaults["policy"] | {"variant": "dummy", "tokenizer": str(tokenizer)}
        policy |= {key: self.meta[key] for key in ("action_dim", "max_token_len")}
        policy |= {key: value for key, value in settings.items() if key not in cls.model_fields}
        self.policy = POLICIES[policy["type"]](**policy)
        stats = load_norm_stats(folder / "norm_stats.json")
        self.normalize = Normalize(stats, self.policy.normalization)

    def stage(self, stage):
        """key -> array of one stage."""
        prefix = f"{stage}|"
        return {key.removeprefix(prefix): self.data[key] for key in self.data.files if key.startswith(prefix)}

    def row(self):
        """What our reader yields for the raw frame."""
        raw = self.stage("raw")
        renamed = self.meta["repack_map"].get("images", {})
        images = {renamed.get(name, name): image for name, image in self.stage("raw_uint8").items()}
        columns = self.dataset.actions
        pads = {f"{column}_is_pad": np.zeros(len(raw[column]), dtype=bool) for column in columns}
        return {**raw, **images, **pads, "task": self.meta["tasks"][str(int(raw["task_index"]))]}

    def encode(self):
        """Our stages, under the reference's names."""
        sample = self.dataset.repack()(self.row())
        for transform in self.dataset.transforms():
            sample = transform(sample)
        yield "data_transforms", sample
        sample = self.normalize(sample)
        yield "normalize", sample
        for transform in self.policy.transforms():
            sample = transform(sample)
        yield "model_transforms", sample

    def decode(self):
        """Our inverse stages, under the reference's names."""
        sample = self.stage("output_in")
        for transform in reversed(self.policy.transforms()):
            sample = transform.inverse(sample)
        sample = self.normalize.inverse(sample)
        yield "output_unnormalized", sample
        for transform in reversed(self.dataset.transforms()):
            sample = transform.inverse(sample)
        yield "output_final", {"actions": sample["actions"]}


@pytest.fixture
def case(transforms_case):
    return Case(transforms_case)


def distance(ours, theirs):
    assert ours.shape == theirs.shape
    return float(np.max(np.abs(ours - theirs), initial=0.0) / max(1.0, float(np.max(np.abs(theirs), initial=0.0))))


def test_defaults_are_the_references(case):
    policy, meta = case.policy, case.meta
    assert policy.type == meta["kind"]
    assert policy.chunk_length() == meta["action_horizon_config"]
    assert policy.discrete_state_input == meta["discrete_state_input"]
    assert (policy.normalization == "quantile") == meta["use_quantile_norm"]
    assert case.dataset.prompt_from_task == meta["prompt_from_task"]
    assert list(case.dataset.actions) == meta["action_sequence_keys"]


def test_encoding_is_the_references(case, report):
    for stage, sample in case.encode():
        theirs = case.stage(stage)
        report(case.name, stage, max(distance(sample[key], theirs[key]) for key in ("state", "actions")), TOLERANCE)
        for camera in CAMERAS:
            assert (camera in sample["images"]) == theirs[f"image_mask::{camera}"]
            if f"image::{camera}" in theirs:
                assert np.array_equal(sample["images"][camera], theirs[f"image::{camera}"])
            elif camera in sample["images"]:  # the data's own images are stored once, as raw
                shape = case.meta["stages"][stage][f"image::{camera}"]["shape"]
                assert sample["images"][camera].shape == tuple(shape)
        if stage != "model_transforms":
            assert sample["prompt"] == case.meta["stages"][stage]["prompt"]["string"]
    assert np.array_equal(sample["tokens"], theirs["tokenized_prompt"])
    assert np.array_equal(sample["token_mask"], theirs["tokenized_prompt_mask"])


def test_decoding_is_the_references(case, report):
    for stage, sample in case.decode():
        theirs = case.stage(stage)
        report(case.name, stage, max(distance(sample[key], theirs[key]) for key in theirs), TOLERANCE)


def test_batch_holds_the_encoded_row_in_float32(case):
    *_, (_, sample) = case.encode()
    theirs = case.stage("model_transforms")
    batch = stack([sample])
    for key in ("state", "actions"):
        assert distance(batch[key][0].numpy(), theirs[key]) <= TOLERANCE
    kept = batch["tokens"].shape[1]
    assert not theirs["tokenized_prompt_mask"][kept:].any()
    assert batch["image_mask"].sum() == sum(theirs[f"image_mask::{camera}"] for camera in CAMERAS)


def test_every_format_has_a_case_but_those_without_a_reference():
    formats = {json.loads((folder / "meta.json").read_text())["config"] for folder in cases("transforms")}
    assert formats - DATASETS.keys() == set()
    if OURS.resolve() == GOLDEN:
        assert DATASETS.keys() - formats == WITHOUT_REFERENCE


def test_an_override_without_a_translation_is_an_error():
    with pytest.raises(LookupError, match="use_magic"):
        translated({"use_magic": True}, {"config": "pi0_libero"})
    with pytest.raises(LookupError, match="cannot follow"):
        translated({"use_direct_resize": True}, {"config": "pi0_libero"})


SIX = (True,) * 6 + (False,)
VARIATIONS = [
    ("pi0_libero", {"extra_delta_transform": False}, ()),
    ("pi05_libero", {"extra_delta_transform": True}, SIX),
    ("pi05_maniskill", {"extra_delta_transform": True}, SIX),
    ("pi0_metaworld", {"extra_delta_transform": True}, (True,) * 3 + (False,)),
    ("pi05_calvin", {"extra_delta_transform": True}, SIX),
    ("pi0_realworld", {"extra_delta_transform": True}, SIX),
    ("pi0_custom", {"extra_delta_transform": False, "default_prompt": "fold"}, (True,) * 9 + (False,)),
    ("pi0_aloha_robotwin", {"adapt_to_pi": True}, SIX * 2),
    ("pi0_aloha_robotwin", {"use_delta_joint_actions": False}, ()),
    ("pi05_aloha_robotwin", {"adapt_to_pi": False}, SIX * 2),
    ("pi05_aloha_robotwin", {"adapt_to_pi": True, "extra_delta_transform": False, "default_prompt": None}, ()),
]


@pytest.mark.parametrize(
    ("config", "overrides", "mask"), VARIATIONS, ids=lambda value: value if isinstance(value, str) else ""
)
def test_overrides_that_the_set_lacks_are_the_formulas_of_its_page(config, overrides, mask):
    case = Case(OURS / "transforms" / config, overrides=overrides, delta_mask=list(mask) or None)
    raw = case.dataset.repack()(case.row())
    adapted = overrides.get("adapt_to_pi", config == "pi05_aloha_robotwin") and "aloha" in config
    width = case.stage("data_transforms")["actions"].shape[1]
    (_, sample), (_, normalized), _ = case.encode()
    state, actions = formulas(raw["state"], raw["actions"], mask, width, adapted=adapted)
    assert distance(sample["state"], state) <= TOLERANCE
    assert distance(sample["actions"], actions) <= TOLERANCE
    back = {"state": normalized["state"], "actions": normalized["actions"]}
    for transform in (case.normalize, *reversed(case.dataset.transforms())):
        back = transform.inverse(back)
    assert distance(back["actions"], raw["actions"]) <= TOLERANCE


def formulas(state, actions, mask, width, *, adapted):
    """Section 2 of golden/README.md once more, number by number."""
    state, actions = state.astype(np.float64), actions.astype(np.float64)
    if adapted:
        signs = np.array([1, -1, -1, 1, 1, 1, 1, 1, -1, -1, 1, 1, 1, 1])
        state, actions = state * signs, actions * signs
        for g in (6, 13):
            p = state[g] * (0.05800 - 0.01844) + 0.01844
            angle = np.arcsin(np.clip((0.022**2 + p**2 - 0.036**2) / (2 * 0.022 * p), -1, 1))
            state[g] = (angle - 0.5476) / (1.6296 - 0.5476)
            actions[:, g] = actions[:, g] * (1.4910 + 0.6213) - 0.6213 - 0.5476
    if width > actions.shape[1]:  # The formats that are filled up early: state and action are as wide.
        state, actions = (
            np.pad(state, (0, width - len(state))),
            np.pad(actions, [(0, 0), (0, width - actions.shape[1])]),
        )
    for i, relative in enumerate(mask):
        if relative:
            actions[:, i] -= state[i]
    return state, actions
