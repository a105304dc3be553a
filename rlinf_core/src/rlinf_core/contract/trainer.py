"""What a trainer is to the rest of the project."""

from __future__ import annotations

from signal import Signals
from typing import TYPE_CHECKING, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from rlinf_core.contract.run import RunConfig
    from rlinf_core.plugins.registry import Plugins
    from rlinf_core.training.distributed.processes import Processes
    from rlinf_core.training.resume import Start


class TrainerConfig(BaseModel):
    """The `[trainer]` table. A subclass narrows `type` to a `Literal` of its own and adds fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    type: str
    """Which trainer this is."""
    global_batch_size: int = Field(default=32, ge=1)
    """Samples an optimizer step, over all ranks."""
    micro_batch_size: int = Field(default=32, ge=1)
    """Samples a rank computes at a time; `global_batch_size` must be a multiple of ranks x this."""

    device: Literal["auto", "cpu"] = "auto"
    """`auto`: each rank's own CUDA device, or the CPU where there is none; `cpu`: the CPU."""
    timeout_seconds: float = Field(default=600.0, ge=1.0)
    """How long ranks wait for one another in a collective: then the run ends, with a flight record of every rank."""

    def check_run(self, run: RunConfig) -> None:
        """Refuse what does not fit the rest of the config. Raises `ValueError` that names the keys."""

    def check_ranks(self, ranks: int) -> None:
        """Refuse a number of processes. Raises `UserError` that names the key and the way out."""

    def build(self, run: RunConfig, *, start: Start, group: Processes, plugins: Plugins) -> Trainer:
        """Build the trainer: open data, build the policy, give it its weights. Called on every rank.

        Args:
            run: The frozen config; this trainer's own table is `run.trainer`.
            start: Where the run starts: step and checkpoint.
            group: The running process group.
            plugins: The loaded plugins, for their hooks and registered classes.
        """
        raise NotImplementedError(f"{type(self).__name__} must define build()")


class Trainer(Protocol):
    """What hooks and `train.py` see of a trainer."""

    run: RunConfig
    """The frozen config."""
    step: int
    """Number of finished optimizer steps."""

    def train(self) -> Signals | None:
        """Run the remaining steps, validating and saving as configured.

        Returns:
            SIGINT or SIGTERM if that ended the run early, on every rank and after saving; else None.
        """
        ...
