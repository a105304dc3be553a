"""The settings of the environment `calvin`. Imports neither CALVIN nor PyBullet."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import metadata, util
from pathlib import Path
from typing import Literal

from pydantic import Field

from rlinf_core import Environment, EnvironmentConfig, EnvironmentTask, UserError
from rlinf_plugins_calvin.tasks import HORIZON, PROMPTS, initial_states

SETTINGS = Path(".hydra") / "merged_config.yaml"
"""The simulator's settings in a folder of the dataset."""
INSTALL = "it is on no package index; install calvin_env and calvin_agent from the repository mees/calvin"


class CalvinConfig(EnvironmentConfig):
    """CALVIN, with the columns of RLinf's formats `pi0_calvin` and `pi05_calvin`, and the benchmark's protocol."""

    type: Literal["calvin"] = "calvin"
    dataset: str = ""
    """A folder of the dataset with the settings of the simulator, `.hydra/merged_config.yaml`: `task_D_D/validation`.
    They name the scene and the cameras."""
    replan: int = Field(default=5, ge=0)
    """Actions of a chunk to execute before the policy looks again; 0: all of them."""

    def tasks(self) -> Sequence[EnvironmentTask]:
        """The 27 tasks with which a chain of the benchmark can begin. Raises `UserError` if CALVIN is not installed."""
        check_installed()
        return [
            EnvironmentTask(name, prompt, HORIZON, initial_states=len(initial_states(name)))
            for name, prompt in PROMPTS.items()
        ]

    def build(self, task: EnvironmentTask) -> Environment:
        """Build a task. Raises `UserError` if CALVIN is not installed, or its settings are missing."""
        check_installed()
        from rlinf_plugins_calvin.environment import CalvinEnvironment

        return CalvinEnvironment(task, self.settings_folder())

    def settings_folder(self) -> Path:
        """The folder with the simulator's settings. Raises `UserError` if there are none."""
        folder = Path(self.dataset).expanduser()
        if not self.dataset or not (folder / SETTINGS).is_file():
            said = f"env.dataset = {self.dataset!r} has no {SETTINGS}" if self.dataset else "env.dataset is not set"
            raise UserError(f"{said}: name a folder of CALVIN's dataset that has it, such as task_D_D/validation")
        return folder

    def facts(self) -> dict[str, str]:
        """Versions of CALVIN and of PyBullet, where their packages say them."""
        found = {}
        for name in ("calvin_env", "calvin", "pybullet"):
            try:
                found[name] = metadata.version(name)
            except metadata.PackageNotFoundError:
                continue
        return found


def check_installed() -> None:
    """Raise `UserError` if the simulator is not installed."""
    if missing := [name for name in ("calvin_env", "calvin_agent") if util.find_spec(name) is None]:
        raise UserError(f"CALVIN's {' and '.join(missing)} cannot be imported: {INSTALL}")
