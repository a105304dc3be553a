"""A run: its whole config, its datasets (`RunSource`), and the protocols of what is built from it: trainer, loggers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from signal import Signals
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, InstanceOf, SerializeAsAny, model_validator

from rlinf_core.contract.datasets import DatasetConfig
from rlinf_core.contract.optim import OptimConfig, OptimTable
from rlinf_core.contract.policy import PolicyConfig
from rlinf_core.contract.process_group import ProcessGroup
from rlinf_core.contract.tables.cluster import ClusterConfig
from rlinf_core.contract.tables.mixture import MixtureConfig
from rlinf_core.contract.tables.runner import RunnerConfig, Section
from rlinf_core.errors import UserError, did_you_mean
from rlinf_core.plugins.owners import Implementation

NOTHING_HELD_OUT = (
    "runner.val_check_interval is set but no episode is held out: "
    "set data.validation_fraction or data.validation_episodes"
)


class TrainerConfig(BaseModel):
    """The `[trainer]` table. A subclass narrows `type` to a `Literal` of its own and adds fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    type: str
    """Which trainer this is."""
    global_batch_size: int = Field(default=32, ge=1)
    """Samples per optimizer step, over all ranks."""
    micro_batch_size: int = Field(default=32, ge=1)
    """Samples a rank computes at a time; `global_batch_size` must be a multiple of ranks x this."""

    device: Literal["auto", "cpu"] = "auto"
    """`auto`: each rank's own CUDA device, or the CPU if there is none; `cpu`: the CPU."""
    timeout_seconds: float = Field(default=600.0, ge=1.0)
    """How long ranks wait for one another in a collective, and how long nothing may happen anywhere else, before the
    run ends with a record of what hangs. A hang outside of a collective is certain after 1.5 times as long, one in a
    save after 3 times."""

    def check_run(self, run: RunConfig) -> None:
        """Check this table against the rest of the config. Raises `ValueError` that names the keys."""

    def check_ranks(self, ranks: int) -> None:
        """Check the number of processes. Raises `UserError` that names the key and the way out."""

    def build(self, run: RunConfig, *, start: Start, group: ProcessGroup, plugins: LoadedPlugins) -> Trainer:
        """Build the trainer: open data, build the policy, give it its weights. Called on every rank.

        Args:
            run: The frozen config; this trainer's own table is `run.trainer`.
            start: Where the run starts: step and checkpoint.
            group: The running process group.
            plugins: The loaded plugins, for their hooks and registered classes.
        """
        raise NotImplementedError(f"{type(self).__name__} must define build()")


class LoggerConfig(BaseModel):
    """A logger that `runner.loggers` can name, and its table `[loggers.<type>]`.

    A subclass gives `type` a `Literal` of its own with a default, and adds fields. Secrets are no fields: the table is
    written to the run's folder.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    type: str
    """The name in `runner.loggers`."""

    def build(self, run: RunConfig, *, start_step: int, stop_step: int) -> Logger:
        """Build the logger on rank 0.

        Args:
            run: The frozen config; `run.folder` is the folder of the run's files.
            start_step: Finished steps (of a resumed run); rows of later steps are to be cut off (contract 9).
            stop_step: The last step of the run, after `runner.max_steps` and `runner.max_epochs`.
        """
        raise NotImplementedError(f"{type(self).__name__} must define build()")


class RunConfig(Section):
    """A whole run, as written to `<run>/config.toml`."""

    seed: int = Field(default=42, ge=0, lt=2**63)
    """Keys every random draw: data order, noise, initial weights."""
    cluster: ClusterConfig = ClusterConfig()
    runner: RunnerConfig = RunnerConfig()
    data: SerializeAsAny[DatasetConfig]
    """The class is the one registered under `data.config_name`, or `MixtureConfig` if there is `data.mixture`. Use
    `sources` for the settings of single datasets."""
    policy: SerializeAsAny[PolicyConfig]
    """The class is the one registered under `policy.type`, which the dataset sets."""
    optim: SerializeAsAny[OptimTable] = OptimConfig()
    """The class is made of those registered under `optim.type` and `optim.schedule`."""
    trainer: SerializeAsAny[TrainerConfig]
    """The class is the one registered under `trainer.type`."""
    evaluators: dict[str, SerializeAsAny[InstanceOf[BaseModel]]] = {}
    """Settings of evaluators; the class of `[evaluators.<type>]` is the one registered under that type."""
    plugins: dict[str, SerializeAsAny[InstanceOf[BaseModel]]] = {}
    """Plugins' own settings; the class of `[plugins.<name>]` is the one registered under that name."""
    loggers: dict[str, SerializeAsAny[InstanceOf[LoggerConfig]]] = {}
    """Settings of loggers; the class of `[loggers.<type>]` is the one registered under that type. The logger must be in
    `runner.loggers`, except `console` and `jsonl`."""

    @property
    def folder(self) -> Path:
        """The folder of the run's files."""
        return Path(self.runner.output_dir) / self.runner.name

    @property
    def checkpoints(self) -> Path:
        """The folder of its checkpoints."""
        return self.runner.checkpoints_of(self.folder)

    @property
    def sources(self) -> tuple[RunSource, ...]:
        """The run's datasets: one, or the entries of `[[data.mixture]]` in order."""
        if not isinstance(self.data, MixtureConfig):
            return (RunSource("", 1.0, 1.0, self),)
        entries = self.data.mixture
        whole = sum(entry.weight for entry in entries)
        return tuple(
            RunSource(entry.name, entry.weight, entry.weight / whole, self.model_copy(update={"data": entry.data}))
            for entry in entries
        )

    def source(self, name: str = "") -> RunSource:
        """One of the run's datasets by name; the name may be left out if there is only one.

        Raises:
            UserError: No dataset has that name, or no name is given and there are several.
        """
        sources = {source.name: source for source in self.sources}
        if not name and len(sources) == 1:
            return next(iter(sources.values()))
        if name not in sources or not name:
            raise UserError(no_source(name, [known for known in sources if known]))
        return sources[name]

    def plugin_options[M: BaseModel](self, cls: type[M]) -> M:
        """A plugin's settings: the `[plugins.<name>]` table of this class, or its defaults if the config has none."""
        for table in self.plugins.values():
            if isinstance(table, cls) and type(table) is cls:
                return table
        return cls()

    @model_validator(mode="after")
    def _validation_needs_held_out_episodes(self) -> RunConfig:
        # Whether an evaluator that is named needs them is known to its class: `config.load` checks that.
        if self.runner.val_check_interval and not self.data.has_validation and not self.runner.evaluators:
            raise ValueError(NOTHING_HELD_OUT)
        return self

    @model_validator(mode="after")
    def _statistics_are_used(self) -> RunConfig:
        if self.policy.normalization != "none":
            return self
        for source in self.sources:
            data = source.run.data
            said = [key for key in ("norm_stats", "norm_floor", "stats_need_images") if getattr(data, key)]
            if said or data.given_statistics():
                whose = f" of {source.name}" if source.name else ""
                raise ValueError(
                    f"data.{said[0] if said else 'norm_stats'}{whose} does nothing: "
                    f"the policy {self.policy.type!r} normalises nothing; leave it out"
                )
        return self

    @model_validator(mode="after")
    def _trainer_agrees(self) -> RunConfig:
        self.trainer.check_run(self)
        return self

    @model_validator(mode="after")
    def _best_needs_validation(self) -> RunConfig:
        keys = ("save_best", "early_stop_patience", "best_metric", "val_at_start")
        set_ = [key for key in keys if getattr(self.runner, key)]
        if set_ and not self.runner.val_check_interval:
            raise ValueError(f"runner.{set_[0]} needs validations: set runner.val_check_interval")
        return self


@dataclass(frozen=True)
class RunSource:
    """A dataset of a run, as if it were the only one."""

    name: str
    """Name of the entry in `[[data.mixture]]`; empty if the run has only one dataset."""
    weight: float
    """The configured weight."""
    share: float
    """The probability that a training sample comes from this dataset; sums to 1 over all sources."""
    run: RunConfig
    """The run with this dataset as its `data`."""

    @property
    def statistics(self) -> str:
        """Path of its statistics, relative to the run's folder or to that of an exported policy."""
        return f"norm_stats/{self.name}.json" if self.name else "norm_stats.json"

    def drawn(self, rows: int, total: int) -> str:
        """How often a mixture draws from it: `weight 2, 66.7% of the samples, 1.25 passes an epoch`.

        Args:
            rows: Training rows of this dataset.
            total: Training rows of all sources: the samples of an epoch.
        """
        passes = self.share * total / max(rows, 1)
        return f"weight {self.weight:g}, {self.share:.1%} of the samples, {passes:.3g} passes an epoch"

    @contextmanager
    def naming(self) -> Iterator[None]:
        """In a mixture, prefix a `UserError` of the body with the source's name."""
        try:
            yield
        except UserError as error:
            if not self.name:
                raise
            raise UserError(f"{self.name}: {error}") from error


def no_source(name: str, names: Sequence[str], where: str = "with --source") -> str:
    """The message for a source that does not exist, or that is not named."""
    if not names:
        return f"there is no source {name!r}: the run has only one dataset"
    which = f"there is no source {name!r}{did_you_mean(name, names)}" if name else "the run has several datasets"
    return f"{which}: name one of {', '.join(names)} {where}"


class Start(Protocol):
    """Where a run starts."""

    @property
    def step(self) -> int:
        """Finished steps."""
        ...

    @property
    def checkpoint(self) -> Path | None:
        """The checkpoint to continue from; None to start from the initial weights."""
        ...

    @property
    def allow_change(self) -> bool:
        """Whether the run may continue with another config, other image files or other training rows than before."""
        ...


class LoadedPlugins(Protocol):
    """The installed plugins, as a trainer uses them."""

    @property
    def hook(self) -> Any:
        """Call a hook in every plugin: `plugins.hook.rlinf_step_finished(trainer=..., step=..., metrics=...)`."""
        ...

    def implementations(self, hook: str) -> Sequence[Implementation]:
        """The implementations of a hook in call order, each with its owner, to be called alone."""
        ...

    def build_loggers(self, run: RunConfig, *, start_step: int, stop_step: int) -> list[Logger]:
        """Build the loggers of the run, on rank 0. One that fails later is left out, except `jsonl`."""
        ...

    def evaluators(self, run: RunConfig) -> Sequence[ChosenEvaluator]:
        """The evaluators of the run, with their settings, in the order in which they are called."""
        ...


class ChosenEvaluator(Protocol):
    """An evaluator of a run; its text names the plugin that registered it."""

    @property
    def config(self) -> Any:
        """Its settings, a `contract.evaluation.EvaluatorConfig`."""
        ...

    def naming(self, doing: str) -> AbstractContextManager[None]:
        """Name the evaluator and its plugin in every error of the body; `doing`: the method that is called."""
        ...


class Trainer(Protocol):
    """What hooks and `train.py` see of a trainer."""

    run: RunConfig
    """The frozen config."""
    step: int
    """Number of finished optimizer steps."""

    def train(self) -> Signals | None:
        """Run the remaining steps, validating and saving as configured.

        Returns:
            SIGINT or SIGTERM if that ended the run early, after saving, the same on every rank; else None.
        """
        ...


class Logger(Protocol):
    """Receives what a run reports. Called on rank 0 only, between steps: what takes long delays training.

    A logger that raises is left out of the rest of the run, with one warning; only `close` is still called.
    """

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
        """The run has ended, with an error or (None) because all steps are done."""
        ...
