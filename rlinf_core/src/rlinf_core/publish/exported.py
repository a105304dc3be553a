"""What an exported folder holds, as its model card describes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlinf_core.contract.policy_options import TrainedOn
from rlinf_core.contract.run import RunConfig
from rlinf_core.publish.measured import Measured

NATIVE = "rlinf"
"""This project's own format; a policy may provide others."""


@dataclass(frozen=True)
class Exported:
    """What a folder holds."""

    run: RunConfig
    """The run, with the policy as it was exported."""
    folder: Path
    """The run's folder."""
    sources: Sequence[TrainedOn]
    """The datasets it is exported for."""
    digests: Mapping[str, str]
    """Name of a dataset -> SHA-256 of its statistics file; none for policies that do not normalise."""
    format: str
    step: int
    """Finished steps of the checkpoint."""
    rows: int
    """Training rows of all datasets."""
    ema: bool
    """Whether the weights are the moving average."""
    dtype: str
    adapters: bool
    """Whether the folder holds adapters without the weights that they belong to."""
    measured: Measured
    licence: str = ""
    """The licence that the user chose for it, by the hub's id."""
