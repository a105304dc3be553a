"""The tables `[loggers.tensorboard]`, `[loggers.wandb]`, `[loggers.swanlab]` and `[loggers.trackio]`.

Secrets are no settings: each tracker has an environment variable or a login of its own.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from rlinf_core import Logger, LoggerConfig, RunConfig, UserError
from rlinf_plugins_trackers.logger import TrackerLogger
from rlinf_plugins_trackers.memory import Job


class TrackerConfig(LoggerConfig):
    """What all trackers have in common. The tracker runs in a process of its own, which follows the run's folder."""

    module: ClassVar[str]
    """The library."""
    restarts: ClassVar[bool] = False
    """Whether steps that were logged before can be logged again, which replaces them."""

    close_timeout: float = Field(default=120.0, gt=0.0, le=86400.0)
    """How long the tracker may take to finish after the end of the run, in seconds. Then it is stopped; `rlinf track`
    logs what is missing."""

    def build(self, run: RunConfig, *, start_step: int, stop_step: int) -> Logger:
        """Start the tracker's process, and wait until it has opened its run."""
        return self.start(run.folder, run.runner.name, start_step)

    def start(self, folder: Path, name: str, start_step: int) -> TrackerLogger:
        """Start the tracker's process for a run's folder.

        Raises:
            UserError: The library is not installed, or the tracker cannot open its run.
        """
        self.check_library()
        settings = self.model_dump(mode="json")
        return TrackerLogger(Job(self.type, settings, str(folder), name, start_step), self.close_timeout)

    def check_library(self) -> None:
        """Raise `UserError` if the tracker's library is not installed."""
        if find_spec(self.module) is None:
            raise UserError(
                f"the logger {self.type!r} needs {self.module}, which is not installed: "
                f"pip install 'rlinf-plugins-trackers[{self.type}]'"
            )

    @property
    def keeps_its_run(self) -> bool:
        """Whether a resumed run continues the same run of the tracker; otherwise it gets a new one with all steps."""
        return True


class TensorBoardConfig(TrackerConfig):
    """Writes event files for TensorBoard: `tensorboard --logdir runs`."""

    module: ClassVar[str] = "tensorboard"
    restarts: ClassVar[bool] = True

    type: Literal["tensorboard"] = "tensorboard"
    dir: str = ""
    """Folder of the event files; empty: `tensorboard` in the run's folder."""


class WandbConfig(TrackerConfig):
    """Logs to Weights & Biases, as whom `WANDB_API_KEY` or `wandb login` says."""

    module: ClassVar[str] = "wandb"

    type: Literal["wandb"] = "wandb"
    project: str = "rlinf"
    """Project of the run."""
    entity: str = ""
    """Team or user that owns the project; empty: the account's default."""
    group: str = ""
    """Group of runs on the project's page; empty: none."""
    job_type: str = ""
    """Kind of run within the group; empty: none."""
    tags: tuple[str, ...] = ()
    """Tags of the run."""
    notes: str = ""
    """Description of the run."""
    mode: Literal["", "online", "offline"] = ""
    """`offline`: only write to the run's folder, for `wandb sync`. Empty: `WANDB_MODE`, otherwise `online`."""


class SwanLabConfig(TrackerConfig):
    """Logs to SwanLab, as whom `SWANLAB_API_KEY` or `swanlab login` says."""

    module: ClassVar[str] = "swanlab"

    type: Literal["swanlab"] = "swanlab"
    project: str = "rlinf"
    """Project of the run."""
    workspace: str = ""
    """User or organization that owns the project; empty: the account's own."""
    group: str = ""
    """Group of runs; empty: none."""
    tags: tuple[str, ...] = ()
    """Tags of the run."""
    description: str = ""
    """Description of the run."""
    mode: Literal["online", "local", "offline"] = "online"
    """`local`: for `swanlab watch` on this machine, with the package swanboard; `offline`: for `swanlab sync` later.
    Both write to `swanlab` in the run's folder. A run of mode `local` that is resumed gets a new experiment with all
    steps, as SwanLab cannot continue one."""

    def check_library(self) -> None:
        """Also for the board of `local` runs."""
        super().check_library()
        if self.mode == "local" and find_spec("swanboard") is None:
            raise UserError(
                'loggers.swanlab.mode = "local" needs swanboard, which is not installed. It asks for an older rich '
                "than rlinf-core and works with both: pip install fastapi 'peewee<4' psutil ujson uvicorn && "
                "pip install --no-deps --pre 'swanboard>=0.1.10b2'"
            )

    @property
    def keeps_its_run(self) -> bool:
        """SwanLab continues an experiment on its server only."""
        return self.mode != "local"


class TrackioConfig(TrackerConfig):
    """Logs to Trackio: a database on this machine, for `trackio show`, or a Space of Hugging Face."""

    module: ClassVar[str] = "trackio"

    type: Literal["trackio"] = "trackio"
    project: str = "rlinf"
    """Project of the run."""
    group: str = ""
    """Group of runs; empty: none."""
    dir: str = ""
    """Folder of the database; empty: `TRACKIO_DIR`, otherwise Trackio's own in the cache of Hugging Face."""
    space_id: str = ""
    """Space to log to, `user/space`, with the token of `HF_TOKEN` or `hf auth login`; empty: this machine only."""


TRACKERS: dict[str, type[TrackerConfig]] = {
    "tensorboard": TensorBoardConfig,
    "wandb": WandbConfig,
    "swanlab": SwanLabConfig,
    "trackio": TrackioConfig,
}
"""Table of each logger by its name."""
