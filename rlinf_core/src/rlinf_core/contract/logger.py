"""What a logger is to the rest of the project: something that rank 0 tells what happened."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from rlinf_core.contract.run import RunConfig


class LoggerConfig(BaseModel):
    """A logger that `runner.loggers` can name. A subclass gives `type` a `Literal` of its own with a default."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    type: str
    """The name in `runner.loggers`."""

    def build(self, run: RunConfig, *, start_step: int, stop_step: int) -> Logger:
        """Build the logger on rank 0.

        Args:
            run: The frozen config; `run.folder` is where the run's files live.
            start_step: Steps that are already done (a resumed run); rows after it are cut (contract 9).
            stop_step: The last step of the run, after `runner.max_steps` and `runner.max_epochs`.
        """
        raise NotImplementedError(f"{type(self).__name__} must define build()")


class Logger(Protocol):
    """Receives what a run reports. Called on rank 0 only."""

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """The metrics of an optimizer step."""
        ...

    def validation(self, step: int, metrics: Mapping[str, float]) -> None:
        """The metrics of a validation."""
        ...

    def message(self, text: str) -> None:
        """Something the user should read once: a checkpoint was saved, a step was skipped."""
        ...

    def close(self, error: BaseException | None) -> None:
        """The run has ended, with an error or (None) with all steps done."""
        ...
