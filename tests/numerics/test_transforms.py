"""Registered dataset formats against the reference, stage by stage, there and back."""

import json
import tomllib
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from golden import GOLDEN, cases, name_of

from rlinf_core.data.normalize import Normalize, load_norm_stats
from rlinf_plugins_openpi import Pi0Config, Pi05Config
from rlinf_plugins_openpi.collate import stack
from rlinf_plugins_openpi.transforms import CAMERAS

PYPROJECT = Path(__file__).parents[2] / "rlinf_plugins_openpi" / "pyproject.toml"
DATASETS = tomllib.loads(PYPROJECT.read_text())["project"]["entry-points"]["rlinf.datasets"]
POLICIES = {"pi0": Pi0Config, "pi05": Pi05Config}
TOLERANCE = 1e-6


def meta_of(folder):
    return json.loads((folder / "meta.json").read_text())


def implemented(folder):
    """Whether this is a format of ours, with overrides that are settings of ours: the reference has others besides."""
    meta = meta_of(folder)
    if meta["config"] not in DATASETS:
        return False
    dataset = dataset_class(meta["config"])
    policy = POLICIES[dataset.run_defaults["policy"]["type"]]
    return meta["overrides"].keys() <= dataset.model_fields.keys() | policy.model_fields.keys()


def dataset_class(name):
    module, attribute = DATASETS[name].split(":")
    return getattr(import_module(module), attribute)


class Case:
    """One folder, and our dataset and policy set up as it says."""

    def __init__(self, folder):
        self.name = name_of(folder)
        self.meta = meta_of(folder)
        self.data = np.load(folder / "data.npz")
        cls, overrides = dataset_class(self.meta["config"]), self.meta["overrides"]
        self.dataset = cls(**{key: value for key, value in overrides.items() if key in cls.model_fields})
        prompts = GOLDEN / "tokenizer"
        tokenizer = prompts / json.loads((prompts / "tokenizer_cases.json").read_text())["sp_model"]
        settings = cls.run_defaults["policy"] | {"variant": "dummy", "tokenizer": str(tokenizer)}
        settings |= {key: self.meta[key] for key in ("action_dim", "max_token_len")}
        settings |= {key: value for key, value in overrides.items() if key not in cls.model_fields}
        self.policy = POLICIES[settings["type"]](**settings)
        stats = load_norm_stats(folder / "norm_stats.json")
        self.normalize = Normalize(stats, self.policy.normalization)

    def stage(self, stage):
        """key -> array of one stage."""
        prefix = f"{stage}|"
        return {key.removeprefix(prefix): self.data[key] for key in self.data.files if key.startswith(prefix)}

    def row(self):
        """What our reader yields for the raw frame."""
        raw = self.stage("raw")
        row = {**raw, **self.stage("raw_uint8")}
        columns = self.dataset.actions
        row |= {f"{column}_is_pad": np.zeros(len(raw[column]), dtype=bool) for column in columns}
        return row | {"task": self.meta["tasks"][str(int(raw["task_index"]))]}

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


@pytest.fixture(params=filter(implemented, cases("transforms")), ids=name_of)
def case(request):
    return Case(request.param)


def distance(ours, theirs):
    assert ours.shape == theirs.shape
    return float(np.max(np.abs(ours - theirs), initial=0.0) / max(1.0, float(np.max(np.abs(theirs), initial=0.0))))


def test_defaults_are_the_references(case):
    policy, meta = case.policy, case.meta
    assert policy.type == meta["kind"]
    assert policy.chunk_length() == meta["action_horizon_config"]
    assert policy.discrete_state_input == meta["discrete_state_input"]
    assert (policy.normalization == "quantile") == meta["use_quantile_norm"]


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
