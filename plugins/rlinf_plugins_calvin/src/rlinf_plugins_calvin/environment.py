"""A task of CALVIN in PyBullet, with the benchmark's own initial states and its own judgement of success."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlinf_core import ActionSpace, EnvironmentTask, EpisodeError, Outcome, Start, UserError
from rlinf_plugins_calvin.config import SETTINGS
from rlinf_plugins_calvin.tasks import initial_states

ACTION_WIDTH = 7
OPEN = 1.0
"""The gripper's action that opens it; -1 closes it. CALVIN accepts no other numbers."""
ORACLE = Path("callbacks/rollout/tasks/new_playtable_tasks.yaml")
"""What decides whether a task is solved, in the folder `conf` beside `calvin_agent`."""
OWN = ("calvin_env", "calvin_agent")
"""Packages of the classes that CALVIN's settings may name."""


class CalvinEnvironment:
    """A task of CALVIN.

    Args:
        task: The task.
        settings: The folder with the simulator's settings.

    Raises:
        UserError: The simulator or its renderer does not start, or its settings name other classes than its own.
    """

    control_hz = 30.0
    actions = ActionSpace(
        low=np.full(ACTION_WIDTH, -1.0, np.float32),
        high=np.full(ACTION_WIDTH, 1.0, np.float32),
        idle=np.array([0.0] * 6 + [OPEN], np.float32),
    )

    def __init__(self, task: EnvironmentTask, settings: Path) -> None:
        check_classes(settings / SETTINGS)
        try:
            from calvin_agent.evaluation.utils import get_env_state_for_initial_condition
            from calvin_env.envs.play_table_env import get_env

            self._oracle = _task_oracle()
            self._env: Any = get_env(settings, show_gui=False)
        except (Exception, SystemExit) as error:  # `get_env` leaves the process if EGL does not start.
            raise UserError(f"CALVIN does not start with {settings}: {_first_line(error)}") from error
        self._state_of = get_env_state_for_initial_condition
        self._task = task.name
        self._seen: Mapping[str, Any] = {}
        self._before: Any = None

    def reset(self, start: Start) -> None:
        """Restore an initial state of the benchmark: the given one, or the one that the seed selects."""
        states = initial_states(self._task)
        number = start.seed % len(states) if start.initial_state is None else start.initial_state
        robot, scene = self._state_of(dict(states[number]))
        self._seen = self._env.reset(robot_obs=robot, scene_obs=scene)
        self._before = self._env.get_info()

    def observe(self) -> Mapping[str, Any]:
        """The columns of RLinf's CALVIN data: two images uint8 [height, width, 3], and three parts of the state."""
        images, robot = self._seen["rgb_obs"], np.asarray(self._seen["robot_obs"], np.float32)
        return {
            "video.image_base": np.ascontiguousarray(images["rgb_static"], np.uint8),
            "video.image_wrist": np.ascontiguousarray(images["rgb_gripper"], np.uint8),
            "state.ee_pos": robot[:3],
            "state.ee_rot": robot[3:6],
            "state.gripper": robot[6:7],
        }

    def step(self, action: NDArray[np.float32]) -> Outcome:
        """Displace the end effector: 1 is 2 cm or 0.05 rad; the gripper opens above 0 and closes otherwise."""
        if not np.isfinite(action).all():
            raise EpisodeError("an action contains NaN or infinity")
        given = np.asarray(action, np.float64).copy()  # CALVIN scales it in place.
        given[-1] = OPEN if given[-1] > 0 else -OPEN
        self._seen, _, _, info = self._env.step(given)
        if not np.isfinite(self._seen["robot_obs"]).all():
            raise EpisodeError("the simulation has become unstable")
        return Outcome(success=bool(self._oracle.get_task_info_for_set(self._before, info, {self._task})))

    def frame(self) -> NDArray[np.uint8]:
        """The image of the fixed camera."""
        return np.ascontiguousarray(self._seen["rgb_obs"]["rgb_static"], np.uint8)

    def close(self) -> None:
        """Disconnect from the simulator."""
        self._env.close()


def check_classes(path: Path) -> None:
    """Check that settings name no classes but CALVIN's own, as these are instantiated.

    Raises:
        UserError: They do, or cannot be read.
    """
    import yaml

    try:
        found = list(_targets(yaml.safe_load(path.read_text(encoding="utf-8"))))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read: {_first_line(error)}") from error
    if strange := [name for name in found if not _is_own(name)]:
        raise UserError(
            f"{path} names {strange[0]}, which is not of CALVIN: its code would be run. Do not use this file"
        )


def _is_own(name: str) -> bool:
    """Whether a name is of a class in one of CALVIN's own files, and not of what such a file imports."""
    package, *parts = name.split(".")
    spec = util.find_spec(package) if package in OWN and len(parts) > 1 else None
    folders = spec.submodule_search_locations if spec else None
    return any(Path(folder, *parts[:-1]).with_suffix(".py").is_file() for folder in folders or ())


def _targets(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        if "_target_" in value:
            yield str(value["_target_"])
        for one in value.values():
            yield from _targets(one)
    elif isinstance(value, list):
        for one in value:
            yield from _targets(one)


def _task_oracle() -> Any:
    """The benchmark's judge of success."""
    import calvin_agent
    import hydra
    from omegaconf import OmegaConf

    path = Path(str(calvin_agent.__file__)).absolute().parents[1] / "conf" / ORACLE
    check_classes(path)
    return hydra.utils.instantiate(OmegaConf.load(path))


def _first_line(error: BaseException) -> str:
    said = str(error).strip() or type(error).__name__
    return f"{type(error).__name__}: {said.splitlines()[0]}"
