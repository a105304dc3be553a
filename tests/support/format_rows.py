"""Dataset formats and their rows, for the tests of formats."""

import numpy as np
import pytest
from pydantic import ValidationError

from rlinf_core.data.normalize import NormStats
from rlinf_core.data.pipeline import build_pipeline
from rlinf_core.testing import write_tiny_dataset
from rlinf_plugins_openpi import Pi0Config, Pi05Config

FRONT, WRIST = "observation.images.front", "observation.images.wrist"
TINY = {"images": {"base_0_rgb": FRONT}, "state": ["observation.state"], "actions": ["action"]}
HORIZON = 4


def policy_of(dataset, **settings):
    cls = {"pi0": Pi0Config, "pi05": Pi05Config}[dataset.run_defaults["policy"]["type"]]
    return cls(variant="dummy", **{"action_horizon": HORIZON} | settings)


def numbers(dataset, *, width=7, seed=0, **others):
    """A row without images of a dataset with one state and one action column."""
    rng = np.random.default_rng(seed)
    (state,), (action,) = dataset.state, dataset.actions
    row = {state: rng.normal(size=width), action: rng.normal(size=(HORIZON, width)), "task": "pick"}
    return row | {f"{action}_is_pad": np.zeros(HORIZON, bool)} | others


SIX = {"action_train_with_rotation_6d": True}
EULER = SIX | {"rotation_format": "euler_xyz", "state_rotations": (3,), "action_rotations": (3,)}


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


def write_format_dataset(root, data):
    """A tiny dataset in the columns of a format, with the widths that it says."""
    return write_tiny_dataset(root, cameras=tuple(data.images.values()), vectors=widths_of(data), lengths=(5, 4))


def widths_of(data):
    """The columns of numbers of a format -> widths; the first of several columns has what the others, of one, leave."""
    state = max(data.state_order) + 1 if data.state_order else data.state_width or 9
    widths = {}
    for columns, total in ((data.state, state), (data.actions, data.action_width or 7)):
        widths |= {columns[0]: total - len(columns) + 1, **dict.fromkeys(columns[1:], 1)}
    return widths
