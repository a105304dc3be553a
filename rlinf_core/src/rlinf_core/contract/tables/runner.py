"""The table `[runner]` of the config, and the base class of core's own tables. Units are given at the fields."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Section(BaseModel):
    """A table of the config."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


MOST_PROFILED = 20
"""Most steps in one trace: a step of a large model takes about 20 MB."""


class RunnerConfig(Section):
    """The `[runner]` table: how long to run, what to write and when."""

    name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run; its files are in `<output_dir>/<name>/`."""
    output_dir: str = "runs"
    """Folder of all runs."""
    max_steps: int = Field(default=30_000, ge=0)
    """Optimizer steps. 0: no limit; this is the default if `max_epochs` is set."""
    max_epochs: int = Field(default=0, ge=0)
    """Passes over the training rows; 0: no limit. If `max_steps` is set too, the run ends at whichever comes first."""
    save_interval: int = Field(default=1000, ge=0)
    """Steps between checkpoints; 0: only after the last step, which is always saved."""
    keep_last: int = Field(default=2, ge=1)
    """Newest checkpoints to keep; older ones are removed once a newer one is complete."""
    keep_every: int = Field(default=0, ge=0)
    """Steps between checkpoints that are kept permanently, a multiple of `save_interval`; 0: none."""
    async_save: bool = True
    """Continue training while a checkpoint is written from a copy in host memory; false: wait, without a copy."""
    checkpoint_dir: str = ""
    """Folder for the checkpoints of all runs, e.g. on a larger mount: `<checkpoint_dir>/<name>/`; empty:
    `<output_dir>/<name>/checkpoints/`."""
    checkpoint_rename: bool = True
    """Write checkpoints to a temporary folder and rename it; false: write in place, for storage without renaming, e.g.
    mounted object storage. Either way, a folder without a valid `state.json`, written last, is never read."""
    val_check_interval: int = Field(default=0, ge=0)
    """Steps between validations on the held-out episodes and by `evaluators`, also after the last step; 0: none."""
    val_at_start: bool = False
    """Validate before the first step, too: what the initial weights can do. It is not compared with later ones."""
    val_samples: int = Field(default=256, ge=1)
    """Held-out frames per validation, evenly spaced; all if there are fewer. In a mixture: of each source."""
    best_metric: str = ""
    """Validation result by which checkpoints are compared, also one of `evaluators`. Empty: the action error if there
    is one, else the loss, and of the EMA weights if there are any. In a mixture, empty means the loss; each source has
    its own results, e.g. `val_loss/<name>`."""
    save_best: bool = False
    """Save whenever `best_metric` improves, and keep that checkpoint, named by the file `best`, until the next one."""
    early_stop_patience: int = Field(default=0, ge=0)
    """Validations in a row without improvement after which the run ends; 0: it never ends early."""
    early_stop_min_delta: float = Field(default=0.0, ge=0.0)
    """How much `best_metric` must change for the better to count as an improvement."""
    max_skipped_steps: int = Field(default=10, ge=0)
    """Skipped steps in a row (loss or gradient not finite) after which the run ends; 0: never."""
    spike_threshold: float = Field(default=10.0, ge=0.0)
    """A loss this many standard deviations (1.4826 x median absolute deviation) above the median of the last 100 steps
    is written to `anomalies.jsonl`; 0: none is."""
    profile: tuple[int, ...] = ()
    """`[start, stop]`: first and last step of a profiler trace that rank 0 writes to `<run>/profile/`; empty: none."""
    resume: Literal["auto", "never"] = "auto"
    """`auto` continues an unfinished run of this name; `never` refuses if one exists (`--overwrite` removes it)."""
    loggers: tuple[str, ...] = ()
    """Loggers, by `type`, in addition to `console` and `jsonl`, which always run."""
    evaluators: tuple[str, ...] = ()
    """Evaluators, by `type`, in addition to `held_out`, which runs if episodes are held out. Each has a table
    `[evaluators.<type>]`."""

    @model_validator(mode="before")
    @classmethod
    def _epochs_alone_are_enough(cls, table: Any) -> Any:
        if isinstance(table, Mapping) and table.get("max_epochs") and "max_steps" not in table:
            return {**table, "max_steps": 0}
        return table

    @model_validator(mode="after")
    def _ends(self) -> RunnerConfig:
        if not self.max_steps and not self.max_epochs:
            raise ValueError("max_steps and max_epochs are both 0: set one of them, or both")
        if self.keep_every and (not self.save_interval or self.keep_every % self.save_interval):
            raise ValueError(
                f"keep_every ({self.keep_every}) must be a multiple of save_interval ({self.save_interval}): only "
                "saved checkpoints can be kept"
            )
        if "://" in self.checkpoint_dir:
            raise ValueError(
                f"checkpoint_dir ({self.checkpoint_dir!r}) must be a folder: mount the storage, name the folder here "
                "and set checkpoint_rename = false if folders cannot be renamed there"
            )
        if self.early_stop_min_delta and not self.early_stop_patience:
            raise ValueError("early_stop_min_delta does nothing without early_stop_patience")
        return self

    @model_validator(mode="after")
    def _profiles_some_steps(self) -> RunnerConfig:
        if not self.profile:
            return self
        if len(self.profile) != 2 or not 1 <= self.profile[0] <= self.profile[1]:
            raise ValueError(f"profile = {list(self.profile)} must be [start, stop]: two steps from 1, in order")
        start, stop = self.profile
        if stop - start >= MOST_PROFILED:
            raise ValueError(
                f"profile = {[start, stop]} has {stop - start + 1} steps: a trace holds at most {MOST_PROFILED}"
            )
        if self.max_steps and stop > self.max_steps:
            raise ValueError(f"profile = {[start, stop]} ends after max_steps = {self.max_steps}")
        return self

    def stop_step(self, steps_per_epoch: int) -> int:
        """The last step: `max_steps`, or the end of `max_epochs`, whichever comes first."""
        limits = (self.max_steps, self.max_epochs * steps_per_epoch)
        return min(limit for limit in limits if limit)

    def checkpoints_of(self, folder: Path) -> Path:
        """The checkpoint folder of the run in `folder`, even if that was moved."""
        return Path(self.checkpoint_dir) / self.name if self.checkpoint_dir else folder / "checkpoints"
