"""A source of rows in memory and the smallest policy config, for tests of everything between them."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch

from rlinf_core.contract.datasets import DatasetConfig
from rlinf_core.contract.policy import PolicyConfig
from rlinf_core.data.transforms import Transform

HORIZON = 4


@dataclass
class Rows:
    """Rows whose numbers follow from their index; `broken` names one that cannot be read, `error` what it raises."""

    rows: int
    broken: int = -1
    error: Exception | None = None

    def __len__(self):
        return self.rows

    def __getitems__(self, indices):
        if self.broken in indices:
            raise self.error
        return [
            row | {"camera": np.full((2, 2, 3), row["index"] % 256, np.uint8)} for row in self.without_images(indices)
        ]

    def without_images(self, indices):
        return [
            {
                "index": int(i),
                "state": np.array([i, -2.0 * i, 1.0], np.float32),
                "actions": np.arange(HORIZON, dtype=np.float32)[:, None] + np.array([i, 0.5 * i], np.float32),
                "task": "do it",
            }
            for i in indices
        ]

    @property
    def episodes(self):
        return np.arange(self.rows) // 10

    def describe(self, index):
        return f"toy, part-0.parquet, episode {index // 10}, frame {index % 10}"

    def fingerprint(self):
        return f"toy {self.rows}"


@dataclass(frozen=True)
class Repack(Transform):
    def __call__(self, row):
        images = {"base": row["camera"]} if "camera" in row else {}
        return {"images": images, "state": row["state"], "actions": row["actions"], "index": row["index"]}


@dataclass(frozen=True)
class Shift(Transform):
    """Actions relative to the first number of the state, times a scale; only inverses in reverse order undo two."""

    scale: float

    def __call__(self, sample):
        return {**sample, "actions": (sample["actions"] - sample["state"][0]) * self.scale}

    def inverse(self, sample):
        return {**sample, "actions": sample["actions"] / self.scale + sample["state"][0]}


@dataclass(frozen=True)
class Pad(Transform):
    """Pad with zeros to the policy's width, as policies do."""

    width: int

    def __call__(self, sample):
        extra = self.width - sample["actions"].shape[-1]
        return {**sample, "actions": np.pad(sample["actions"], [(0, 0), (0, extra)])}


class ToyDataset(DatasetConfig):
    def repack(self):
        return Repack()

    def transforms(self):
        return (Shift(scale=3.0),)


class ToyPolicy(PolicyConfig):
    normalization: ClassVar[Literal["mean_std", "quantile", "none"]] = "quantile"
    type: Literal["toy"] = "toy"

    def transforms(self):
        return (Pad(width=5),)

    def draw(self, generator):
        return {"noise": generator.standard_normal(3, np.float32)}

    def collate(self, samples):
        batch = {key: torch.from_numpy(np.stack([s[key] for s in samples])) for key in ("state", "actions", "noise")}
        return batch | {"index": torch.tensor([s["index"] for s in samples])}
