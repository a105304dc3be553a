"""LIBERO in MuJoCo: one task, stepped without rendering, rendered when the policy looks."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlinf_core import ActionSpace, EnvironmentTask, EpisodeError, Outcome, Start, UserError
from rlinf_plugins_libero.observation import proprioception, upright
from rlinf_plugins_libero.suites import read_states, require_benchmark, task_files

CAMERA, WRIST_CAMERA = "agentview", "robot0_eye_in_hand"
ACTION_WIDTH = 7
ARM_NOISE = 0.02
"""Standard deviation in radians of the joint angles in the recorded initial states, measured over all suites; episodes
from seeds have the same."""
_ATTEMPTS = 100
"""How often to draw places for the objects. The benchmark itself draws without end."""
_NO_RENDERER = (ImportError, RuntimeError, AttributeError, ValueError, AssertionError)
"""What robosuite and PyOpenGL raise where they cannot render, or cannot make sense of the visible GPUs."""
_INSTABILITIES = ("mjWARN_BADQPOS", "mjWARN_BADQVEL", "mjWARN_BADQACC")


class LiberoEnvironment:
    """A task of LIBERO.

    Args:
        suite: The suite that has the task.
        task: The task.
        image_size: Pixels per side of both cameras.
        reflections: Whether shiny surfaces reflect the scene.

    Raises:
        UserError: The simulator is not installed, or cannot render here.
    """

    control_hz = 20.0
    actions = ActionSpace(
        low=np.full(ACTION_WIDTH, -1.0, np.float32),
        high=np.full(ACTION_WIDTH, 1.0, np.float32),
        idle=np.array([0.0] * 6 + [-1.0], np.float32),  # Gripper: -1 opens, 1 closes.
    )

    def __init__(self, suite: str, task: EnvironmentTask, *, image_size: int = 256, reflections: bool = True) -> None:
        require_benchmark()
        files = task_files(suite, task.name)
        self._size = image_size
        self._states = read_states(files.states)
        make = _import_simulator()
        np.random.seed(0)  # The benchmark draws from NumPy's global generator, here too.
        try:
            # The model is loaded once: a hard reset loads it again, which takes seconds and changes nothing else.
            self._control = make(
                bddl_file_name=str(files.scene),
                use_camera_obs=False,
                has_renderer=False,
                has_offscreen_renderer=True,
                hard_reset=False,
                ignore_done=True,
                control_freq=int(self.control_hz),
            )
        except _NO_RENDERER as error:
            raise UserError(_cannot_render(error)) from error
        import mujoco

        self.sim._render_context_offscreen.scn.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = reflections
        self._instabilities = [getattr(mujoco.mjtWarning, name) for name in _INSTABILITIES]
        model = self.sim.model
        self._fixtures = model.body_pos.copy(), model.body_quat.copy()
        self._seen: Mapping[str, Any] = {}

    @property
    def sim(self) -> Any:
        """The simulation, for scripts that need more than a policy sees: `sim.data.qpos`, poses of bodies."""
        return self._control.sim

    @property
    def values(self) -> Mapping[str, Any]:
        """What robosuite observes in the current state, such as `robot0_eef_pos` and `<object>_pos` [3] in metres."""
        return self._seen

    def reset(self, start: Start) -> None:
        """Reset the scene, then restore the recorded initial state if the start names one.

        The seed also decides where fixtures are, such as cabinets, which recorded states do not contain.
        """
        np.random.seed(start.seed % 2**32)
        recorded = start.initial_state is not None
        for robot in self._control.robots:
            robot.initialization_noise = {"magnitude": 0.0 if recorded else ARM_NOISE, "type": "gaussian"}
        model = self.sim.model
        model.body_pos[:], model.body_quat[:] = self._fixtures  # Else places would depend on the episode before.
        self._reset()
        state = self._states[start.initial_state] if start.initial_state is not None else self._control.get_sim_state()
        for robot in self._control.robots:
            robot.gripper.current_action = np.zeros(robot.gripper.dof)  # Else it closes from where it was left.
        self.sim.data.qacc_warmstart[:] = 0.0  # The solver's first guess, which is part of no recorded state.
        self._seen = self._control.set_init_state(state)

    def observe(self) -> Mapping[str, Any]:
        """`image` and `wrist_image`, uint8 [size, size, 3], and `state`, float32 [8]."""
        return {
            "image": self._render(CAMERA),
            "wrist_image": self._render(WRIST_CAMERA),
            "state": proprioception(self._seen),
        }

    def step(self, action: NDArray[np.float32]) -> Outcome:
        """Displace the end effector, in units of the controller: 1 is 5 cm or 0.5 rad."""
        if not np.isfinite(action).all():
            raise EpisodeError("an action contains NaN or infinity")
        self._seen, _, success, _ = self._control.step(action.astype(np.float64))
        if any(self.sim.data._data.warning[kind].number for kind in self._instabilities):
            raise EpisodeError("the simulation has become unstable")
        return Outcome(success=bool(success))

    def frame(self) -> NDArray[np.uint8]:
        """The image of the fixed camera."""
        return self._render(CAMERA)

    def close(self) -> None:
        """Release the renderer."""
        self._use_own_context()  # Else it deletes the buffers of whichever context rendered last.
        self._control.close()

    def _reset(self) -> None:
        from robosuite.utils.errors import RandomizationError

        for _ in range(_ATTEMPTS):
            try:
                self._control.env.reset()
            except RandomizationError:
                continue
            return
        raise EpisodeError(f"the objects found no place in {_ATTEMPTS} attempts: start from a recorded initial state")

    def _render(self, camera: str) -> NDArray[np.uint8]:
        self._use_own_context()  # Else the context made last renders, of any scene.
        return upright(self.sim.render(camera_name=camera, width=self._size, height=self._size))

    def _use_own_context(self) -> None:
        self.sim._render_context_offscreen.gl_ctx.make_current()


def _import_simulator() -> Any:
    if sys.platform == "linux":
        os.environ.setdefault("MUJOCO_GL", "egl")  # Renders without a display, on a GPU or in software.
        if os.environ.get("CUDA_VISIBLE_DEVICES") == "":  # robosuite would take it for the number of a GPU.
            os.environ.setdefault("MUJOCO_EGL_DEVICE_ID", "0")
    _quiet_robosuite()
    try:
        from libero.libero.envs.env_wrapper import ControlEnv
    except _NO_RENDERER as error:
        raise UserError(_cannot_render(error)) from error
    return ControlEnv


def _quiet_robosuite() -> None:
    """Load robosuite's settings before robosuite, so that it does not log to /tmp/robosuite.log.

    The name is fixed: whoever imports robosuite second on a shared machine gets a PermissionError.
    """
    name = "robosuite.macros"
    package = importlib.util.find_spec("robosuite")
    if name in sys.modules or package is None or not package.submodule_search_locations:
        return
    path = os.path.join(next(iter(package.submodule_search_locations)), "macros.py")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    macros = importlib.util.module_from_spec(spec)
    sys.modules[name] = macros
    spec.loader.exec_module(macros)
    macros.FILE_LOGGING_LEVEL = None  # type: ignore[attr-defined]
    macros.CONSOLE_LOGGING_LEVEL = "ERROR"  # type: ignore[attr-defined]


def _cannot_render(error: Exception) -> str:
    chosen = os.environ.get("MUJOCO_GL", "")
    return (
        f"LIBERO cannot start its renderer (MUJOCO_GL={chosen!r}, {type(error).__name__}: {error}). On Linux without a "
        "display install EGL (Debian: libegl1 libgl1-mesa-dri), or libosmesa6 and set MUJOCO_GL=osmesa. If some GPUs "
        "are hidden by CUDA_VISIBLE_DEVICES, set MUJOCO_EGL_DEVICE_ID to the number of one that is visible"
    )
