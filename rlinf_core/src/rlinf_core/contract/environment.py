"""Environments: simulators in which core lets a policy act, to measure how often it succeeds. Torch-free.

A plugin offers an `EnvironmentConfig` (hook `rlinf_register_environments`), which lists its tasks and builds an
`Environment` for one of them. Core owns everything else: processes, chunks of actions, seeds, time limits, videos and
intervals (`rlinf_core.rollout`). Environments run in processes of their own, which never load torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SerializeAsAny, ValidationInfo

from rlinf_core.contract.registered import resolve


@dataclass(frozen=True)
class EnvironmentTask:
    """A task of an environment."""

    name: str
    """The name that selects it, such as `reach-v3`."""
    prompt: str
    """The instruction that the policy gets."""
    horizon: int
    """Most control steps of an episode, without those that let the scene settle."""
    initial_states: int = 0
    """Number of recorded initial states; 0: episodes start from seeds only."""
    group: str = ""
    """The suite that the task belongs to, if the environment has several."""


@dataclass(frozen=True)
class Start:
    """What an episode starts from."""

    seed: int
    """Seeds everything that the environment draws: a reset with the same start gives the same episode."""
    initial_state: int | None = None
    """Number of the recorded initial state, below `EnvironmentTask.initial_states`; None: drawn from the seed."""


class Outcome(NamedTuple):
    """What a control step did."""

    success: bool
    """Whether the task is solved in the state after this step."""
    ended: bool = False
    """Whether the environment cannot go on, for example because its own time limit is reached."""
    reward: float | None = None
    """The environment's own reward of this step; None if it says nothing that `success` does not."""


@dataclass(frozen=True, eq=False)
class ActionSpace:
    """The actions of an environment, in the units of the dataset that policies are trained on."""

    low: NDArray[np.float32]
    """[D], the smallest action; actions are not clipped to it, the environment does what its controller does."""
    high: NDArray[np.float32]
    """[D], the largest action."""
    idle: NDArray[np.float32]
    """[D], the action that does as little as possible: zero displacements, the gripper as it is at the start. Core uses
    it to let the scene settle and for the baseline `idle`."""


class EpisodeError(Exception):
    """Raise this in `Environment.reset` or `step` if an episode cannot be finished and counts as failed.

    For example if the simulation has become unstable after the policy's actions. Any other exception ends the
    evaluation with an error that names the environment.
    """


class Environment(Protocol):
    """A simulator with one task, in a process of its own. Its methods are called one at a time, from one thread.

    An episode is `reset`, then `observe` and `step` by turns. The simulator's own random numbers must follow from
    `Start` alone, so that an episode is the same in whichever process it runs.
    """

    @property
    def actions(self) -> ActionSpace:
        """Bounds of actions, and the one that does nothing."""
        ...

    @property
    def control_hz(self) -> float:
        """Control steps per second of simulated time."""
        ...

    def reset(self, start: Start) -> None:
        """Put the scene into its initial state. Raises `EpisodeError` as `step` does."""
        ...

    def observe(self) -> Mapping[str, Any]:
        """The observation, as a row of the dataset: images uint8 [height, width, 3] RGB and vectors [D] under the
        dataset's column names, as the dataset records them, before any transform. Core adds `task`.

        It is called only when the policy looks, so render here rather than in `step`.
        """
        ...

    def step(self, action: NDArray[np.float32]) -> Outcome:
        """Execute one control step.

        Args:
            action: [D], in the units of the dataset.

        Raises:
            EpisodeError: The episode counts as failed.
        """
        ...

    def frame(self) -> NDArray[np.uint8]:
        """The current scene for people, uint8 [height, width, 3] RGB: usually an image of `observe`."""
        ...

    def close(self) -> None:
        """Release windows, contexts and files."""
        ...


class EnvironmentConfig(BaseModel):
    """The settings of an environment. A subclass gives `type` a `Literal` of its own with a default and adds fields.

    It is sent to the processes of the environment: import the simulator in `build`, not in the module. A subclass may
    give the fields below other defaults: its benchmark's protocol.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    type: str
    """Which environment this is."""
    columns: dict[str, str] = {}
    """Name of a part of the observation -> the dataset's column for it, where the dataset's names are others."""
    settle_steps: int = Field(default=0, ge=0)
    """Control steps of the idle action after a reset, before the policy acts: objects fall into place."""
    action_repeat: int = Field(default=1, ge=1)
    """Control steps for which each action is executed: the control rate divided by the dataset's frames per second."""
    replan: int = Field(default=0, ge=0)
    """Actions of a chunk to execute before the policy looks again; 0: all of them."""
    horizon: int = Field(default=0, ge=0)
    """Most control steps of an episode; 0: as the task says."""
    after_success: int = Field(default=0, ge=0)
    """Control steps to continue after the first success, to see whether it lasts; 0: an episode ends with it, and
    success at the end is the same as success ever."""

    def tasks(self) -> Sequence[EnvironmentTask]:
        """Every task, in the benchmark's order. Must be quick, and load neither torch nor a renderer.

        Raises:
            UserError: The simulator is not installed, or its files are missing.
        """
        raise NotImplementedError(f"{type(self).__name__} must define tasks()")

    def build(self, task: EnvironmentTask) -> Environment:
        """Build the environment of a task, in its process.

        Raises:
            UserError: Something that the user can fix: a library or a renderer is missing.
        """
        raise NotImplementedError(f"{type(self).__name__} must define build()")

    def facts(self) -> Mapping[str, str]:
        """What a success rate depends on beside these settings: versions of simulator and assets, the renderer."""
        return {}


def _resolve(entry: object, info: ValidationInfo) -> EnvironmentConfig:
    found: EnvironmentConfig = resolve(entry, info, "environment", EnvironmentConfig, "an environment")
    return found


ChosenEnvironment = Annotated[SerializeAsAny[EnvironmentConfig], BeforeValidator(_resolve)]
"""Type of a config's environment: a name, a table with `type` and its settings, or an instance."""
