"""What the tests look at: the policy, rows of training, of held-out episodes and of the site, and sampled actions."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rlinf_core.contract.datasets import SampleSource, TimedSource
from rlinf_core.data.coverage import CompareObservation, CompareState
from rlinf_core.data.loading.encoding import read_rows
from rlinf_core.data.loading.sampling import validation_generator
from rlinf_core.data.pipeline import Pipeline
from rlinf_core.data.statistics.names import name_dimensions
from rlinf_core.data.transforms import Transform
from rlinf_core.errors import UserError
from rlinf_core.exported import CheckTrainingState
from rlinf_core.inference import LoadedPolicy
from rlinf_core.rollout.config import RolloutSettings
from rlinf_core.training.distributed.processes import to_device
from rlinf_core.triage.mistakes.corrections import NOTHING, Correction
from rlinf_core.triage.mistakes.families import explain_site
from rlinf_core.triage.mistakes.likeness import Likeness
from rlinf_core.triage.mistakes.rows import Rows, Vectors, choose_runs, read, spread
from rlinf_core.triage.mistakes.search import Comparison, Explanation
from rlinf_core.triage.served import Served
from rlinf_core.untrusted.text import path_inside

REFERENCE = 320
"""Training rows with images that others are compared with."""
WIDE = 2500
"""Training rows without images, for scales and for predictions of the state's change."""
RUNS, LENGTH = 28, 6
"""Runs of consecutive rows of the site, and rows of a run."""
ACTED = 64
"""Rows for which the policy samples actions."""
BATCH = 16
MINUTES = 10.0
"""How long the policy plays in a simulator, at most."""


@dataclass(frozen=True)
class Subject:
    """What is triaged."""

    folder: Path
    """The run's folder, or an exported one."""
    exported: bool
    """Whether it is a folder that `rlinf export` wrote."""
    ema: bool
    """Whether the weights are averaged."""
    step: int | None
    description: Mapping[str, Any] = field(default_factory=dict)
    """The content of `rlinf.json`; empty for a run."""
    run: Path | None = None
    """The folder of the run that it is from, if it is on this machine."""
    notes: tuple[str, ...] = ()

    def changed_files(self, kind: str) -> list[str]:
        """Files of an exported folder, with `kind` in their name, whose hash is not the recorded one."""
        recorded = self.description.get("sha256", {})
        changed = []
        for name, digest in recorded.items() if isinstance(recorded, Mapping) else ():
            with suppress(ValueError):  # A name that leads out of the folder is not one of its files.
                path = path_inside(self.folder, name)
                if kind in name and path.is_file() and _sha256(path) != digest:
                    changed.append(name)
        return changed


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class Execution:
    """How the robot executes chunks; None where it is not known."""

    steps: int | None = None
    """Actions of a chunk that are executed before the next observation is used."""
    rate: float | None = None
    """Actions per second."""


@dataclass(frozen=True)
class Simulator:
    """A simulator in which the policy acts."""

    settings: RolloutSettings
    """How it is played; `episodes` per task and setting."""
    closed_loop: bool
    """Whether the policy plays episodes."""
    rate_note: str = ""
    """How the simulator's rate differs from that of the data; empty if it does not."""
    minutes: float = MINUTES
    """How long the policy may play."""


@dataclass(eq=False)
class Scene:
    """Implements `contract.triage.TriageScene`; rows and actions are read once, when a test asks for them."""

    policy: LoadedPolicy
    subject: Subject
    training: SampleSource | None
    held_out: SampleSource | None
    site: SampleSource | None
    seed: int = 42
    execution: Execution = Execution()
    simulator: Simulator | None = None
    """The simulator in which the policy acts."""
    server: Served | None = None
    """A server that should act as the policy does."""
    plugins: Any = None
    progress: Callable[[int, int], object] = lambda done, all: None

    @property
    def trained(self) -> SampleSource:
        """The training rows; raises `UserError` if they are not on this machine."""
        if self.training is None:
            raise UserError("the training data are not on this machine")
        return self.training

    @cached_property
    def pipeline(self) -> Pipeline:
        """The policy's pipeline without the checks of what a robot observes."""
        checks = CompareObservation | CompareState | CheckTrainingState
        pipeline = self.policy.pipeline
        return replace(pipeline, dataset=tuple(one for one in pipeline.dataset if not isinstance(one, checks)))

    @cached_property
    def names(self) -> Mapping[str, tuple[str, ...]]:
        """`state` and `actions` -> the dataset's names of their numbers."""
        if self.training is None:
            return {}
        return name_dimensions(self.policy.data, self.training, [self.policy.data.repack()])

    @cached_property
    def wide(self) -> Rows:
        """Many training rows without images."""
        return read(self.trained, self.pipeline, spread(len(self.trained), WIDE), images=False)

    @cached_property
    def likeness(self) -> Likeness:
        """How much rows look like training rows."""
        reference = read(self.trained, self.pipeline, spread(len(self.trained), REFERENCE))
        if len(np.unique(reference.episodes)) < 2:
            raise UserError("the training data have a single episode: rows cannot be compared with those of others")
        return Likeness(reference, self.wide)

    def runs_of(self, source: SampleSource) -> Rows:
        """Runs of consecutive rows."""
        indices, runs = choose_runs(source.episodes, RUNS, LENGTH)
        return read(source, self.pipeline, indices, runs)

    @cached_property
    def stand_in(self) -> Rows:
        """Rows of training that play the site."""
        return self.runs_of(self.trained)

    @cached_property
    def at_site(self) -> Rows:
        """Rows of the site as they are; raises `UserError` if they cannot be compared with those of training."""
        assert self.site is not None
        rows = self.runs_of(self.site)
        there = self.likeness.reference
        for what, here, trained in (("state", rows.state, there.state), ("action", rows.actions, there.actions)):
            if here is not None and trained is not None and here.shape[-1] != trained.shape[-1]:
                raise UserError(
                    f"the {what} of the site has {here.shape[-1]} numbers, that of training {trained.shape[-1]}"
                )
        return rows

    @property
    def comparison(self) -> Comparison:
        """The site beside training."""
        return Comparison(self.likeness, self.at_site, self.stand_in, self.seed)

    @cached_property
    def explanation(self) -> Explanation:
        """How the site differs from training; the tests of the site share the search."""
        return explain_site(self.comparison, self.names)

    def step_seconds(self, source: SampleSource | None) -> float | None:
        """Seconds between the actions of a chunk; None if they are not known."""
        return source.step_seconds() if isinstance(source, TimedSource) else None

    # Actions of the policy -------------------------------------------------------------------------------------------

    def act(
        self,
        source: SampleSource,
        indices: Sequence[int],
        correction: Correction = NOTHING,
        *,
        pipeline: Pipeline | None = None,
        policy: LoadedPolicy | None = None,
    ) -> Acted:
        """The policy's actions for rows, beside the recorded ones.

        Args:
            source: The rows.
            indices: Which; with a lag, those whose later row is in the same episode are left out.
            correction: Applied to what the policy gets, and to the recorded actions.
            pipeline: Another pipeline than the policy's.
            policy: Another policy.
        """
        policy, pipeline = policy or self.policy, pipeline or self.pipeline
        predicted, recorded, within, used = [], [], [], []
        for start in range(0, len(indices), BATCH):
            part = [i for i in indices[start : start + BATCH] if _later(source, i, correction) is not None]
            if not part:
                continue
            samples, targets = _encoded(source, part, correction, pipeline)
            noise = np.stack([policy.config.draw(validation_generator(self.seed, i))["noise"] for i in part])
            batch: Mapping[str, Any] = to_device(policy.config.collate(samples), policy.device)
            actions = policy.sample(batch, torch.from_numpy(noise).to(policy.device))
            for sample, target, chunk in zip(samples, targets, actions.float().cpu().numpy(), strict=True):
                decoded = pipeline.decode(chunk, sample)
                predicted.append(decoded[:, : target["actions"].shape[-1]])
                recorded.append(target["actions"])
                within.append(~target["actions_is_pad"])
            used += part
        if not used:
            raise UserError("there are no rows to act on")
        numbers = (np.stack(predicted).astype(np.float64), np.stack(recorded).astype(np.float64), np.stack(within))
        return Acted(np.asarray(used), source.episodes[np.asarray(used)], *numbers)

    def spread_rows(self, source: SampleSource, most: int = ACTED) -> list[int]:
        """Evenly spread rows to act on."""
        return [int(i) for i in spread(len(source), most)]

    @cached_property
    def baseline(self) -> Vectors:
        """[D], the mean action of training."""
        return np.asarray(self.wide.actions[:, 0].mean(0))

    @cached_property
    def action_spread(self) -> Vectors:
        """[D], the standard deviation of actions in training; 1 for numbers that never change."""
        spread_of = self.wide.actions.reshape(-1, self.wide.actions.shape[-1]).std(0)
        return np.where(spread_of > 1e-6, spread_of, 1.0)

    @cached_property
    def on_training(self) -> Acted:
        """The policy's actions on training rows."""
        return self.act(self.trained, self.spread_rows(self.trained))

    @cached_property
    def on_held_out(self) -> Acted | None:
        """The policy's actions on held-out rows; None if there are none."""
        return None if self.held_out is None else self.act(self.held_out, self.spread_rows(self.held_out))

    @cached_property
    def on_site(self) -> Acted:
        """The policy's actions at the site, as it is."""
        assert self.site is not None
        return self.act(self.site, self.spread_rows(self.site))


@dataclass(frozen=True, eq=False)
class Acted:
    """Sampled actions beside the recorded ones, in the data's units."""

    indices: NDArray[np.int64]
    episodes: NDArray[np.int64]
    predicted: Vectors
    """[N, H, D]."""
    recorded: Vectors
    """[N, H, D]."""
    within: NDArray[np.bool_]
    """[N, H], False past the end of the episode."""

    def errors(self, scale: Vectors) -> Vectors:
        """[N], mean squared error of each row's chunk in squared standard deviations of training."""
        return self._mean(np.square((self.predicted - self.recorded) / scale).mean(-1))

    def errors_of(self, guess: Vectors, scale: Vectors) -> Vectors:
        """[N], as `errors`, of always the same action [D]."""
        return self._mean(np.square((guess - self.recorded) / scale).mean(-1))

    def by_step(self, scale: Vectors) -> Vectors:
        """[H], root mean squared error of each step of the chunk."""
        squared = np.square((self.predicted - self.recorded) / scale).mean(-1)
        return np.asarray(np.sqrt((squared * self.within).sum(0) / np.maximum(self.within.sum(0), 1)))

    def by_number(self, scale: Vectors) -> Vectors:
        """[D], root mean squared error of each number of the action."""
        squared = np.square((self.predicted - self.recorded) / scale) * self.within[..., None]
        return np.asarray(np.sqrt(squared.sum((0, 1)) / np.maximum(self.within.sum(), 1)))

    def _mean(self, squared: Vectors) -> Vectors:
        return np.asarray((squared * self.within).sum(1) / np.maximum(self.within.sum(1), 1))


def _later(source: SampleSource, index: int, correction: Correction) -> tuple[int, int] | None:
    """The rows whose images and state belong to a row; None if they are in another episode."""
    found = index + correction.image_lag, index + correction.state_lag
    there = all(0 <= i < len(source) and source.episodes[i] == source.episodes[index] for i in found)
    return found if there else None


def _encoded(
    source: SampleSource, indices: Sequence[int], correction: Correction, pipeline: Pipeline
) -> tuple[list[Any], list[Any]]:
    """Encoded samples and targets, after a correction."""
    rows = dict(zip(indices, read_rows(source, indices), strict=True))
    lags = {i: _later(source, i, correction) or (i, i) for i in indices}
    missing = sorted({i for pair in lags.values() for i in pair} - rows.keys())
    rows |= dict(zip(missing, read_rows(source, missing), strict=True)) if missing else {}
    samples, targets = [], []
    for index in indices:
        own = dict(pipeline.target(rows[index]))
        if correction is not NOTHING:
            seen, felt = (dict(pipeline.target(rows[i])) for i in lags[index])
            own = correction.fix(own, seen, felt)
        targets.append(own)
        samples.append(replace(pipeline, repack=_Given(own)).encode({}))
    return samples, targets


@dataclass(frozen=True)
class _Given(Transform):
    """A repacking transform whose result is there already."""

    sample: Any

    def __call__(self, sample: Any) -> Any:
        """Return it."""
        return dict(self.sample)
