"""Two toy datasets for one policy: the toy rows, and a robot with one action dimension in another range."""

from dataclasses import dataclass

import numpy as np
import toy_policy
from distributions import entry_point, repository_entry_points
from toy_data import Rows, ToyDataset
from toy_policy import RepackWhole

from rlinf_core import hookimpl
from rlinf_core.plugins.registry import DATASET_GROUP, PLUGIN_GROUP, Plugins

CONFIG = """
[data]
num_workers = 0
[[data.mixture]]
config_name = "toy"
weight = 3
rows = 60
validation_fraction = 0.1
[[data.mixture]]
config_name = "narrow"
rows = 20
validation_fraction = 0.1
[trainer]
device = "cpu"
param_dtype = "fp32"
global_batch_size = 8
micro_batch_size = 4
[optim]
lr = 1e-2
warmup_steps = 0
[runner]
max_steps = 12
"""


class NarrowRows(Rows):
    """Rows of a robot with one action dimension, in another range and unit."""

    def without_images(self, indices):
        return [
            row | {"state": row["state"] * 0.1 + 7, "actions": row["actions"][:, :1] * 50 - 900, "task": "push it"}
            for row in super().without_images(indices)
        ]

    def fingerprint(self):
        return f"narrow {self.rows}"


@dataclass(frozen=True)
class RepackNarrow(RepackWhole):
    pass


class NarrowDataset(ToyDataset):
    """Knows nothing of mixtures, like a third party's config."""

    run_defaults = {"policy": {"type": "trainable_toy"}}
    rows: int = 200

    def repack(self):
        return RepackNarrow()


@hookimpl
def rlinf_open_dataset(dataset, split):
    if isinstance(dataset, NarrowDataset):
        return NarrowRows(dataset.rows if split == "train" else dataset.rows // 10)
    return None


def toy_plugins(**datasets):
    """The plugins of this repository, the toys, and further dataset classes by name."""
    import toy_mixture

    classes = {"toy": toy_policy.TrainableToyDataset, "narrow": NarrowDataset} | datasets
    return Plugins(
        [
            *repository_entry_points(),
            entry_point(PLUGIN_GROUP, "toy", toy_policy, "toy-policy"),
            entry_point(PLUGIN_GROUP, "toy_mixture", toy_mixture, "toy-mixture"),
            *(entry_point(DATASET_GROUP, name, cls, f"{name}-arm") for name, cls in classes.items()),
        ]
    )


def states_of(rows: Rows, indices):
    return np.stack([row["state"] for row in rows.without_images(indices)])
