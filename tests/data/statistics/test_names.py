"""Names of dimensions follow their numbers through transforms, and are absent rather than wrong."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from distributions import ROOT, repository_plugins

from rlinf_core import UserError
from rlinf_core.config.load import load_config
from rlinf_core.data.splits import open_split
from rlinf_core.data.statistics.names import name_dimensions
from rlinf_core.data.transforms import RelativeActions, Transform

STATE = ("x", "y", "z", "gripper_opening")
ACTIONS = ("dx", "dy", "dz", "gripper_effort")


@pytest.fixture(scope="module")
def metaworld():
    """Data and source of the quickstart, whose dataset names its four numbers."""
    run = load_config(ROOT / "examples" / "quickstart.toml", [], repository_plugins())
    return run.data, open_split(run, repository_plugins(), "train")


@dataclass(frozen=True)
class Change(Transform):
    """Changes the actions by a function."""

    function: Any

    def __call__(self, sample):
        return {**sample, "actions": self.function(sample["actions"], sample["state"])}


@dataclass(frozen=True)
class ChangeBatches(Change):
    """The same, of many rows at once."""

    batched = True

    def __call__(self, sample):
        return super().__call__(sample)


def turned(actions, state):
    """As a change of coordinates does: two numbers become a mixture of both."""
    x, y = actions[..., 0], actions[..., 1]
    return np.stack([0.6 * x - 0.8 * y, 0.8 * x + 0.6 * y, actions[..., 2], actions[..., 3]], axis=-1)


def unlike(actions, state):
    raise UserError("these values were never recorded") if np.any(actions < -0.9999999) else ValueError("nor these")


@pytest.mark.parametrize("kind", [Change, ChangeBatches])
@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda actions, state: actions, ACTIONS),
        (lambda actions, state: actions[..., [3, 2, 0, 1]], ("gripper_effort", "dz", "dx", "dy")),
        (lambda actions, state: actions[..., 2:], ("dz", "gripper_effort")),
        (lambda actions, state: np.where(actions > 0.5, 1.0, 0.0), ACTIONS),
        (lambda actions, state: -2 * actions, ACTIONS),
        (lambda actions, state: np.pad(actions, [(0, 0)] * (actions.ndim - 1) + [(0, 2)]), (*ACTIONS, "", "")),
        (lambda actions, state: np.concatenate([np.sin(actions[..., :1]), actions], -1), ("", "", *ACTIONS[1:])),
        (lambda actions, state: np.cumsum(actions, axis=-1), ()),
        (turned, ("", "", "dz", "gripper_effort")),
        (unlike, ()),
    ],
    ids=["same", "permuted", "sliced", "thresholds", "scaled", "padded", "twice", "summed", "turned", "refused"],
)
def test_a_name_follows_its_number(metaworld, kind, function, expected):
    data, source = metaworld
    names = name_dimensions(data, source, [data.repack(), kind(function)])
    assert names.get("actions", ()) == expected
    assert names.get("state", ()) == (() if function is unlike else STATE)


def test_relative_actions_keep_the_names_of_the_actions(metaworld):
    data, source = metaworld
    names = name_dimensions(data, source, [data.repack(), RelativeActions((True, True, True, False))])
    assert names == {"state": STATE, "actions": ACTIONS}


def test_a_constant_number_keeps_its_name(metaworld):
    data, source = metaworld
    columns, first = source.columns, source.columns([0])["observation.state"][0]
    still = ChangeBatches(lambda actions, state: actions)

    class Still(type(source)):
        def columns(self, indices):
            found = columns(indices)
            return {**found, "observation.state": np.zeros_like(found["observation.state"]) + first}

    constant = Still.__new__(Still)
    constant.__dict__ = source.__dict__
    assert name_dimensions(data, constant, [data.repack(), still])["state"] == STATE


def test_columns_without_names_and_transforms_with_images_have_none(metaworld, monkeypatch):
    data, source = metaworld
    seeing = data.model_copy(update={"stats_need_images": True})
    assert name_dimensions(seeing, source, [data.repack()]) == {}
    monkeypatch.setitem(source.metadata.features["action"], "names", None)
    assert name_dimensions(data, source, [data.repack()]) == {"state": STATE}
