"""Record demonstrations of one LIBERO task, "put the bowl on the plate", with a scripted controller.

The result is a LeRobot dataset in the columns of `physical-intelligence/libero`, so that the formats `pi0_libero` and
`pi05_libero` read it: two cameras, the state and the controller's displacements. Nothing is downloaded. From the
repository root (the group `libero` brings the simulator)::

    uv run --group libero python examples/record_libero.py --output FOLDER --episodes 60 --seed 0

Episodes start from seeds, never from the benchmark's recorded initial states, from which policies are evaluated.

Two things differ from the published dataset, to fit in minutes on a CPU: images have 128 pixels per side and no
reflections, and each action is held for two control steps, as frames are at 10 Hz. `examples/libero_small.toml`
evaluates in the same setting.

Licences: LIBERO is MIT, its assets have their own licences; MuJoCo and lerobot are Apache-2.0.
"""

import argparse
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # Nothing here needs the network; fail if that ever changes.

import numpy as np

from rlinf_core import Start
from rlinf_plugins_libero.config import LiberoConfig, LiberoGoalConfig
from rlinf_plugins_libero.environment import LiberoEnvironment

TASK = "put_the_bowl_on_the_plate"
BOWL, PLATE, HAND = "akita_black_bowl_1_pos", "plate_1_pos", "robot0_eef_pos"
SETTING = LiberoGoalConfig(image_size=128, reflections=False, action_repeat=2)
FPS = 10
RIM = np.array([0.0, 0.05, 0.03])  # Metres from the bowl's origin to its rim, where the fingers close along y.
GAIN = 20.0  # Controller units per metre: an action of 1 moves the target by 5 cm.
LIFT, ABOVE, DROP = 0.18, 0.10, 0.04  # Metres.
OPEN, CLOSE = -1.0, 1.0
MAX_DECISIONS = 60  # The expert needs about 40.
DECISIONS_AFTER_SUCCESS = 2
NOISE = 0.2  # Standard deviation of what is added to executed displacements; the recorded action is without it.
IMAGE = {
    "dtype": "image",
    "shape": (SETTING.image_size, SETTING.image_size, 3),
    "names": ["height", "width", "channel"],
}
FEATURES = {
    "image": IMAGE,
    "wrist_image": IMAGE,
    "state": {"dtype": "float32", "shape": (8,), "names": ["state"]},
    "actions": {"dtype": "float32", "shape": (7,), "names": ["actions"]},
}


class Waypoint(NamedTuple):
    """Where the hand goes next: a target in metres from the observables, and when it is reached."""

    target: Callable[[Mapping[str, Any]], np.ndarray]
    gripper: float
    tolerance: tuple[float, float] = (0.0, 0.0)
    """Horizontal and vertical, in metres; zeros: never reached by position."""
    decisions: int = 0
    """Go on after so many decisions; 0: when the target is reached."""


def waypoints(start: Mapping[str, Any]) -> Iterator[Waypoint]:
    """The route to the bowl's rim, up, over the plate and down."""
    height = float(start[BOWL][2]) + LIFT
    grasp = RIM.copy()

    def hold(seen: Mapping[str, Any]) -> np.ndarray:
        return seen[HAND]

    def up(seen: Mapping[str, Any]) -> np.ndarray:
        return np.array([*seen[HAND][:2], height])

    def over(seen: Mapping[str, Any]) -> np.ndarray:
        return np.array([*(seen[PLATE] + grasp)[:2], height])

    yield Waypoint(lambda seen: seen[BOWL] + RIM + [0, 0, ABOVE - RIM[2]], OPEN, (0.01, 0.03))
    yield Waypoint(lambda seen: seen[BOWL] + RIM, OPEN, (0.01, 0.012))
    yield Waypoint(hold, CLOSE, decisions=6)
    yield Waypoint(up, CLOSE, (1.0, 0.02))
    yield Waypoint(over, CLOSE, (0.02, 1.0))
    yield Waypoint(lambda seen: seen[PLATE] + grasp + [0, 0, DROP], CLOSE, (1.0, 0.02))
    yield Waypoint(hold, OPEN)


def expert(start: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], np.ndarray]:
    """A controller that follows the waypoints: observables -> action, float32 [7], which never rotates the hand."""
    route = waypoints(start)
    now, spent = next(route), 0

    def act(seen: Mapping[str, Any]) -> np.ndarray:
        nonlocal now, spent
        away = np.abs(now.target(seen) - seen[HAND])
        near = np.hypot(*away[:2]) <= now.tolerance[0] and away[2] <= now.tolerance[1] and now.tolerance[0] > 0
        if near or (now.decisions and spent >= now.decisions):
            now, spent = next(route), 0
        spent += 1
        move = np.clip(GAIN * (now.target(seen) - seen[HAND]), -1.0, 1.0)
        return np.array([*move, 0.0, 0.0, 0.0, now.gripper], np.float32)

    return act


def episode(env: LiberoEnvironment, seed: int, noise: float = NOISE) -> list[dict[str, Any]] | None:
    """Let the expert play an episode.

    Noise on what is executed, but not on what is recorded, shows the policy how to return to the route.

    Returns:
        A frame per decision: the observation before it and the expert's action. None if the expert failed.
    """
    rng = np.random.default_rng(seed)
    env.reset(Start(seed))
    for _ in range(SETTING.settle_steps):
        env.step(env.actions.idle)
    act = expert(env.values)
    frames: list[dict[str, Any]] = []
    left: int | None = None
    while left != 0:
        if left is None and len(frames) == MAX_DECISIONS:
            return None
        action = act(env.values)
        frames.append({**env.observe(), "actions": action})
        executed = action.copy()
        executed[:3] = np.clip(action[:3] + rng.normal(0.0, noise, 3) * (np.abs(action[:3]).max() > 0), -1.0, 1.0)
        success = any(env.step(executed).success for _ in range(SETTING.action_repeat))
        left = left - 1 if left is not None else DECISIONS_AFTER_SUCCESS if success else None
    return frames


def build(setting: LiberoConfig = SETTING) -> tuple[LiberoEnvironment, str]:
    """The environment and its instruction."""
    task = next(task for task in setting.tasks() if task.name == TASK)
    env = setting.build(task)
    assert isinstance(env, LiberoEnvironment)
    return env, task.prompt


def main() -> None:
    """Record the dataset."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="the dataset's folder, which must not exist")
    parser.add_argument("--episodes", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0, help="of the first episode")
    options = parser.parse_args()
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    env, prompt = build()
    dataset = LeRobotDataset.create(
        "local/libero_bowl_on_plate", FPS, FEATURES, root=options.output, robot_type="panda", use_videos=False
    )
    seed = options.seed
    while dataset.num_episodes < options.episodes:
        frames = episode(env, seed)
        print(f"seed {seed}: {f'{len(frames)} frames' if frames else 'the expert failed, left out'}", flush=True)
        seed += 1
        for frame in frames or []:
            dataset.add_frame({**frame, "task": prompt})
        if frames:
            dataset.save_episode()
    dataset.finalize()
    env.close()
    print(f"{options.output}: {dataset.num_episodes} episodes, {dataset.num_frames} frames")


if __name__ == "__main__":
    main()
