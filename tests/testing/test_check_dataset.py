"""`check_dataset` passes what conforms and names every rule that a dataset breaks."""

from dataclasses import dataclass

import arm_policy
import numpy as np
import pytest
from arm_policy import ArmDataset, Needs, OtherDataset, Stateful, Unpicklable, findings
from distributions import repository_plugins

from rlinf_core.data.transforms import Concatenate, Transform
from rlinf_core.testing import check_dataset, plugins_in_memory
from rlinf_plugins_openpi import Pi05Config
from rlinf_plugins_openpi.datasets.metaworld import Pi05MetaworldConfig

METAWORLD = "examples/data/metaworld_3tasks"


@pytest.fixture(scope="module")
def plugins():
    return plugins_in_memory(arm_policy)


@pytest.fixture
def dataset(tiny_dataset):
    return ArmDataset(repo_id=str(tiny_dataset.root))


def test_a_dataset_that_conforms_passes(dataset, plugins):
    report = check_dataset(dataset, rows=8, plugins=plugins)
    assert "inverses restore actions to within 1e-05 of the largest value" in report.checked
    assert report.not_checked == ()


def test_a_dataset_of_a_policy_that_needs_weights_is_checked_up_to_there():
    dataset = Pi05MetaworldConfig(repo_id=METAWORLD)
    [line] = check_dataset(dataset, rows=3).not_checked
    assert line.startswith("the policy's own transforms (pass policy=): the full-size variant")
    assert check_dataset(dataset, rows=3, policy=Pi05Config(variant="dummy", action_horizon=5)).not_checked == ()


def test_a_class_is_checked_without_its_data(plugins):
    report = check_dataset(ArmDataset, plugins=plugins)
    assert report.not_checked == ("rows: repo_id = '' is not on this machine (pass a config that names a folder)",)


@pytest.mark.parametrize("name", [entry.name for entry in repository_plugins().datasets()])
def test_every_dataset_of_this_repository_conforms(name):
    plugins = repository_plugins()
    found = plugins.dataset(name)
    # A format of one's own leaves it to the user how actions are trained.
    check_dataset(found(raw_action_is_delta=True) if name.endswith("_custom") else found, plugins=plugins)


def test_every_missing_column_is_named(tiny_dataset, plugins):
    dataset = ArmDataset(repo_id=str(tiny_dataset.root), images={"front": "image"}, state=("stat",), actions=("act",))
    lines = findings(check_dataset, dataset, plugins=plugins)
    assert [line.partition("; ")[0] for line in lines] == [
        f"data.{key} names columns of the dataset" for key in ("images.front", "state", "actions")
    ]
    assert "data.state names 'stat', which" in lines[1]


def test_a_folder_without_a_dataset_is_found(tmp_path, plugins):
    [line] = findings(check_dataset, ArmDataset(repo_id=str(tmp_path)), plugins=plugins)
    assert line.startswith("the folder holds a LeRobot dataset; it raised UserError: ")


def test_a_dataset_that_nobody_opens_is_found(tmp_path, plugins):
    [line] = findings(check_dataset, OtherDataset(repo_id=str(tmp_path)), plugins=plugins)
    assert line.startswith("training rows open; it raised UserError: no plugin opens it: derive from LeRobotDataset")


@dataclass(frozen=True)
class Halve(Transform):
    """Forgets its inverse."""

    def __call__(self, sample):
        return {**sample, "actions": sample["actions"] / 2} if "actions" in sample else sample


class Erase(Concatenate):
    """Writes into what it is given."""

    def __call__(self, row):
        row["observation.state"] *= 0
        return super().__call__(row)


@dataclass(frozen=True)
class Jitter(Transform):
    def __call__(self, sample):
        return {**sample, "prompt": str(next(Stateful.count))}


@dataclass(frozen=True)
class Cut(Transform):
    def inverse(self, sample):
        return {**sample, "actions": sample["actions"][:, :1]}

    def __call__(self, sample):
        return sample


@dataclass(frozen=True)
class Center(Transform):
    """Says that it takes many rows at once, and mixes them up."""

    batched = True

    def __call__(self, sample):
        return {**sample, "state": sample["state"] - sample["state"].mean()}


class Reversed(Concatenate):
    """Repacks images in another form."""

    def __call__(self, sample):
        out = super().__call__(sample)
        return {**out, "images": {name: image.astype(np.float32) / 255 for name, image in out["images"].items()}}


def repack_as(cls):
    return lambda self: cls(images=self.images, state=self.state, actions=self.actions)


DATASET_BREAKS = [
    ("__doc__", None, "the class has a docstring, which listings show"),
    ("model_config", {"frozen": True}, "the config forbids unknown keys (model_config)"),
    (
        "run_defaults",
        {"policy": {"type": "amr"}},
        "run_defaults' policy.type 'amr' is registered; it raised UserError: unknown policy 'amr'; did you mean 'arm'?",
    ),
    (
        "run_defaults",
        {"policy": {"type": "arm", "horizn": 2}},
        "run_defaults' policy table is valid; found policy.horizn: Extra inputs are not permitted",
    ),
    ("run_defaults", {"optimm": {}, "policy": {"type": "arm"}}, "run_defaults sets keys that a run has; found optimm"),
    ("run_defaults", {"optim": None}, "run_defaults can be written as TOML; it raised TypeError: "),
    (
        "transforms",
        lambda self: (Halve(),),
        "inverses restore actions to within 1e-05 of the largest value; found dimension ",
    ),
    (
        "transforms",
        lambda self: (Cut(),),
        "decoded actions have the data's shape (remove the policy's padding in the dataset's transforms); "
        "found (3, 1), the data's is (3, 2)",
    ),
    ("repack", lambda self: repack_as(Erase)(self), "repack and transforms change no array in place"),
    ("transforms", lambda self: (Jitter(),), "one row is the same each time"),
    (
        "transforms",
        lambda self: (Center(),),
        "`batched` transforms give the same values for many rows at once as for each row alone",
    ),
    (
        "transforms",
        lambda self: (Unpicklable(),),
        "rows and transforms can be pickled (they are sent to workers); it raised TypeError: no copy of me",
    ),
    (
        "transforms",
        lambda self: (Needs("actions"),),
        "transforms take a sample without actions (inference); it raised KeyError: 'actions'",
    ),
    ("transforms", lambda self: 1 // 0, "repack() and transforms() can be called; it raised ZeroDivisionError: "),
    ("repack", repack_as(Reversed), "images.front is uint8 [height, width, 3]; found float32 [32, 32, 3]"),
]


@pytest.mark.parametrize(("name", "broken", "finding"), DATASET_BREAKS, ids=[case[-1][:60] for case in DATASET_BREAKS])
def test_defects_of_a_dataset_are_found_one_by_one(monkeypatch, dataset, plugins, name, broken, finding):
    monkeypatch.setattr(ArmDataset, name, broken)
    [line] = findings(check_dataset, dataset, rows=4, plugins=plugins)
    assert line.startswith(finding)


@dataclass(frozen=True)
class Brightness(Transform):
    """A state that is read off an image."""

    def __call__(self, sample):
        return {**sample, "state": np.float32([sample["images"]["front"].mean()])}


def test_statistics_without_images_are_checked(monkeypatch, tiny_dataset, plugins):
    monkeypatch.setattr(ArmDataset, "transforms", lambda self: (Brightness(),))
    dataset = ArmDataset(repo_id=str(tiny_dataset.root))
    lines = findings(check_dataset, dataset, rows=4, plugins=plugins)
    assert lines[0].startswith("statistics can be computed, without images unless stats_need_images is set; it raised")
    assert "set data.stats_need_images = true" in lines[0]
    check_dataset(dataset.model_copy(update={"stats_need_images": True}), rows=4, plugins=plugins)
