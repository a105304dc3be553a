"""The one place that states the order of transforms. Training, statistics, evaluation and robot control share it.

row -> repack -> dataset's transforms -> normalise -> policy's transforms -> sample            encode
actions <- dataset's inverses <- unnormalise <- policy's inverses <- policy's output            decode
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlinf_core.contract.datasets import DatasetConfig
from rlinf_core.contract.policy import PolicyConfig
from rlinf_core.data.normalize import Normalize, Stats
from rlinf_core.data.sample import Row, Sample
from rlinf_core.data.transforms import Transform
from rlinf_core.errors import UserError


@dataclass(frozen=True)
class Pipeline:
    """From rows to samples for a policy, and from the policy's actions back to the robot's."""

    repack: Transform
    dataset: tuple[Transform, ...] = ()
    normalize: Normalize | None = None
    policy: tuple[Transform, ...] = ()

    @property
    def invertible(self) -> tuple[Transform, ...]:
        """Everything after repacking, in the order of encoding."""
        return (*self.dataset, *((self.normalize,) if self.normalize else ()), *self.policy)

    def target(self, row: Row) -> Sample:
        """The row under a sample's names, in the data's own units: what decoded actions are compared with."""
        return self.repack(row)

    def encode(self, row: Row) -> Sample:
        """The sample a policy sees; all floating-point numbers are float32. It may share memory with the row."""
        sample = self.repack(row)
        for transform in self.invertible:
            sample = transform(sample)
        return {key: _float32(value) for key, value in sample.items()}  # type: ignore[return-value]

    def decode(self, actions: NDArray[np.floating], sample: Sample) -> NDArray[np.floating]:
        """A policy's actions in the data's own units.

        Args:
            actions: [H, A], or [B, H, A] for several chunks of one sample.
            sample: What `encode` made of the observation; its normalised state is where relative actions start.

        Returns:
            [H, D] or [B, H, D].
        """
        if actions.ndim == 3:
            return np.stack([self.decode(chunk, sample) for chunk in actions])
        decoded = Sample(actions=actions)
        if "state" in sample:
            decoded["state"] = sample["state"]
        for transform in reversed(self.invertible):
            decoded = transform.inverse(decoded)
            if transform is self.normalize:  # What is wider is the policy's padding: the statistics know the data.
                decoded["actions"] = decoded["actions"][..., : len(self.normalize.stats["actions"].mean)]
        return decoded["actions"]


def build_pipeline(dataset: DatasetConfig, policy: PolicyConfig, stats: Stats | None) -> Pipeline:
    """Put together what dataset and policy ask for.

    Args:
        dataset: Brings repacking and its own transforms.
        policy: Says how to normalise, and brings what follows.
        stats: Statistics of `state` and `actions`; None only for policies that normalise nothing.

    Raises:
        UserError: The policy normalises and there are no statistics.
    """
    normalize = None
    if policy.normalization != "none":
        if stats is None:
            raise UserError(
                f"the policy {policy.type!r} normalises by {policy.normalization}, but there are no statistics"
            )
        normalize = Normalize(stats, policy.normalization)
    return Pipeline(dataset.repack(), tuple(dataset.transforms()), normalize, tuple(policy.transforms()))


def _float32(value: Any) -> Any:
    if isinstance(value, (np.ndarray, np.floating)):
        return value.astype(np.float32, copy=False) if value.dtype.kind == "f" else value
    if isinstance(value, Mapping):
        return {key: _float32(inner) for key, inner in value.items()}
    return value
