"""How a policy is judged in a simulator: `[evaluators.simulator]` and the options of `rlinf eval --env`. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from rlinf_core.contract.environment import ChosenEnvironment, EnvironmentTask
from rlinf_core.errors import UserError, did_you_mean

BaselineName = Literal["idle", "random", "replay"]


class RolloutSettings(BaseModel):
    """What is played, and in how many processes."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    env: ChosenEnvironment
    """The environment: its name, or a table with its name as `type` and its settings, as `{ type = "metaworld",
    action_repeat = 4 }`."""
    tasks: tuple[str | int, ...] = ()
    """Tasks, by name or by their number from 0; empty: all of the environment's."""
    episodes: int = Field(default=20, ge=1)
    """Episodes per task. Episode i starts from seed `seed + i`, and from the recorded initial state i if there are any,
    beginning again after the last."""
    seed: int = Field(default=100_000, ge=0)
    """Seed of the first episode of each task; take others than those with which demonstrations were recorded."""
    processes: int = Field(default=2, ge=1)
    """Processes of the environment. In a run, each rank of the first machine has so many."""
    timeout_seconds: float = Field(default=300.0, gt=0)
    """Longest time that an environment may take to start, to reset, or to execute a chunk of actions."""
    baselines: tuple[BaselineName, ...] = ("idle", "random", "replay")
    """What is measured beside the policy: the idle action, uniformly random actions, and the actions of demonstrations
    of the same task, replayed without looking."""
    videos: int = Field(default=1, ge=0)
    """Videos to keep per task: of so many successes and of so many failures."""
    video_every: int = Field(default=0, ge=0)
    """Actions between frames of videos; 0: a frame whenever the policy looks, which costs no rendering."""

    def identity(self) -> dict[str, Any]:
        """What the result of an episode depends on, beside who acts; JSON values."""
        return {"env": self.env.model_dump(mode="json"), "seed": self.seed, "facts": dict(self.env.facts())}

    def chosen_tasks(self) -> list[EnvironmentTask]:
        """The tasks to play.

        Raises:
            UserError: The environment has no such task, or is not installed.
        """
        return choose_tasks(self.env.tasks(), self.tasks, self.env.type)


def choose_tasks(there: Sequence[EnvironmentTask], wanted: Sequence[str | int], env: str) -> list[EnvironmentTask]:
    """Tasks by name or number; all of them if none is wanted.

    Raises:
        UserError: There is no such task; the message names all that are missing.
    """
    by_name = {task.name: task for task in there}
    chosen: list[EnvironmentTask] = []
    missing = []
    for one in wanted:
        number = int(one) if str(one).isdigit() and str(one) not in by_name else None
        if number is not None and number < len(there):
            chosen.append(there[number])
        elif str(one) in by_name:
            chosen.append(by_name[str(one)])
        else:
            missing.append(f"{one!r}{did_you_mean(str(one), by_name)}")
    if missing:
        names = list(by_name)
        listed = ", ".join(names) if len(names) <= 20 else f"{', '.join(names[:20])} and {len(names) - 20} more"
        raise UserError(
            f"the environment {env!r} has no task {' and no task '.join(missing)} (tasks, by name or by number from 0: "
            f"{listed})"
        )
    return list(dict.fromkeys(chosen)) if wanted else list(there)
