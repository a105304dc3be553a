"""The one definition of the order of transforms, shared by training, statistics, evaluation and robot control.

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
from rlinf_core.errors import UserError, did_you_mean


@dataclass(frozen=True)
class Pipeline:
    """Converts rows to samples for a policy, and the policy's actions back to the robot's units."""

    repack: Transform
    dataset: tuple[Transform, ...] = ()
    normalize: Normalize | None = None
    policy: tuple[Transform, ...] = ()

    @property
    def invertible(self) -> tuple[Transform, ...]:
        """All transforms after repacking, in encoding order."""
        return (*self.dataset, *((self.normalize,) if self.normalize else ()), *self.policy)

    def target(self, row: Row) -> Sample:
        """The repacked row, in the data's own units; decoded actions are compared with it."""
        return self.repack(row)

    def encode(self, row: Row, actions: NDArray[np.floating] | None = None) -> Sample:
        """The sample that the policy sees; floating-point arrays are float32. It may share memory with the row.

        Args:
            row: A row in the dataset's format.
            actions: [T, D] actions in the data's own units, as `decode` gives them, instead of the row's.
        """
        sample = self.repack(row)
        if actions is not None:
            sample = {**sample, "actions": actions}
        for transform in self.invertible:
            sample = transform(sample)
        return {key: _float32(value) for key, value in sample.items()}  # type: ignore[return-value]

    def decode(self, actions: NDArray[np.floating], sample: Sample) -> NDArray[np.floating]:
        """Convert a policy's actions to the data's own units.

        Args:
            actions: [H, A], or [B, H, A] for several chunks of one sample.
            sample: The encoded observation; relative actions start from its normalised state.

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
            if transform is self.normalize:  # Wider dimensions are the policy's padding.
                decoded["actions"] = decoded["actions"][..., : len(self.normalize.stats["actions"].mean)]
        return decoded["actions"]


def build_pipeline(dataset: DatasetConfig, policy: PolicyConfig, stats: Stats | None) -> Pipeline:
    """Assemble the pipeline of a dataset and a policy.

    Args:
        dataset: Provides repacking and its own transforms.
        policy: Chooses the normalisation and provides the transforms after it.
        stats: Statistics of `state` and `actions`; None only for policies that do not normalise.

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


def encode_observation(
    pipeline: Pipeline, dataset: DatasetConfig, observation: Row, actions: NDArray[np.floating] | None = None
) -> Sample:
    """Encode an observation in the dataset's format; only the columns that the dataset reads are used.

    Args:
        pipeline: The dataset's pipeline.
        dataset: The format of the observation.
        observation: A row.
        actions: [T, D] actions in the data's own units to encode with it.

    Raises:
        UserError: The observation lacks columns (the message names them all), or its state or task is invalid.
    """
    columns = dataset.observation_columns()
    # A task overrides the default prompt, which may be all that the columns ask for.
    wanted = (*columns, "task") if columns else observation
    seen = {column: observation[column] for column in wanted if column in observation}
    # Checked here: training skips a camera that a row lacks, but a robot that loses one must raise an error.
    if missing := [column for column in columns if column not in observation]:
        hints = did_you_mean(missing[0], observation.keys() - set(columns))
        raise UserError(
            f"the observation lacks {', '.join(map(repr, missing))}; it has {', '.join(observation) or 'nothing'}"
            f"{hints}. Names must be those of the dataset that the policy was trained on"
        )
    if not isinstance(seen.get("task", ""), str):
        raise UserError(f"the observation's 'task' is {seen['task']!r}, but must be a string")
    try:
        return pipeline.encode(seen, actions)
    except KeyError as error:
        raise UserError(
            f"the observation lacks {error.args[0]!r}; it has {', '.join(observation) or 'nothing'}"
        ) from error


def _float32(value: Any) -> Any:
    if isinstance(value, (np.ndarray, np.floating)):
        return value.astype(np.float32, copy=False) if value.dtype.kind == "f" else value
    if isinstance(value, Mapping):
        return {key: _float32(inner) for key, inner in value.items()}
    return value
