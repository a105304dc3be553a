"""The settings of the environment `gymnasium`. Imports neither Gymnasium nor a simulator."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import metadata, util
from typing import Any, Literal

from pydantic import Field, model_validator

from rlinf_core import Environment, EnvironmentConfig, EnvironmentTask, UserError
from rlinf_plugins_gymnasium.tasks import KNOWN, Known


class GymnasiumConfig(EnvironmentConfig):
    """Environments of Gymnasium by their ids. `gym_pusht/PushT-v0` and those of `gym_aloha` need no settings."""

    type: Literal["gymnasium"] = "gymnasium"
    ids: tuple[str, ...] = ()
    """Ids of further environments, which the settings below are for."""
    package: str = ""
    """The module that registers `ids`, on import; empty: they are Gymnasium's own."""
    options: dict[str, Any] = {}
    """Arguments of `gymnasium.make` for `ids`."""
    observation: dict[str, str] = {}
    """For `ids`: part of the observation, as a path such as `pixels/top`, `""` for all of it, and `render` for the
    rendered image -> column of the dataset."""
    prompt: str = ""
    """For `ids`: the instruction."""
    success: str = "is_success"
    """The key of a step's `info` that says whether the task is solved."""
    reward_of_success: float | None = None
    """For environments without such a key: the task is solved while the reward is at least this."""
    hold: str = ""
    """For `ids`: the part of the observation that, as an action, keeps the robot where it is; empty: zeros do."""
    control_hz: float = Field(default=0.0, ge=0.0)
    """For `ids`: control steps per second; 0: as the environment says (`render_fps`)."""

    @model_validator(mode="after")
    def _ids_are_described(self) -> GymnasiumConfig:
        if both := [one for one in self.ids if one in KNOWN]:
            raise ValueError(f"ids: {both[0]} needs no settings: leave it out of ids")
        if self.ids and not self.observation:
            raise ValueError(
                "ids need `observation`, which says which part of an observation is which column of the dataset, as in "
                '{ "pixels" = "observation.image", "agent_pos" = "observation.state" }'
            )
        return self

    def tasks(self) -> Sequence[EnvironmentTask]:
        """The environments in `ids`, and the known ones that are installed."""
        own = [EnvironmentTask(one, self.prompt, self.horizon or self._horizon(one)) for one in self.ids]
        known = [
            EnvironmentTask(one, known.prompt, known.horizon)
            for one, known in KNOWN.items()
            if util.find_spec(known.package) is not None
        ]
        if not own and not known:
            raise UserError(
                "no environment of Gymnasium is known that is installed: pip install "
                "'rlinf-plugins-gymnasium[pusht,aloha]', or name others in `ids`"
            )
        return [*own, *known]

    def known(self, task: str) -> Known:
        """What is known about an environment, or what the settings say."""
        if task in KNOWN:
            return KNOWN[task]
        return Known(self.package, "", self.observation, self.prompt, 0, self.control_hz, self.hold, self.options)

    def build(self, task: EnvironmentTask) -> Environment:
        """Build an environment."""
        from rlinf_plugins_gymnasium.environment import GymnasiumEnvironment

        return GymnasiumEnvironment(self, task, self.known(task.name))

    def facts(self) -> dict[str, str]:
        """Versions of Gymnasium and of the packages of environments."""
        packages = ["gymnasium", "gym-aloha", "gym-pusht", "mujoco", "pymunk"]
        there = [one for one in packages if util.find_spec(one.replace("-", "_")) is not None]
        return {name: metadata.version(name) for name in there}

    def _horizon(self, name: str) -> int:
        """The time limit that an environment was registered with."""
        from rlinf_plugins_gymnasium.environment import spec_of

        steps = spec_of(name, self.package).max_episode_steps
        if not steps:
            raise UserError(f"{name} has no time limit of its own: set `horizon`")
        return int(steps)
