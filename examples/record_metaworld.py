"""Record this repository's small MetaWorld dataset: scripted experts in MuJoCo, written with lerobot's own writer.

The result (`examples/data/metaworld_3tasks`) is a real LeRobot v3.0 dataset in the schema of `lerobot/metaworld_mt50`:
one 224 x 224 camera as H.264 video, a 4-dimensional state, a 4-dimensional action and a task sentence. Tests and the
quickstart train on it. The constants and `make_env`, `reset`, `render` and `step_held` below define the setting; an
evaluation must import them from here, or copy them exactly, so that the policy sees what it was trained on.

Exact command, from the repository root (the group `record` brings MetaWorld and MuJoCo)::

    uv run --group record python examples/record_metaworld.py --output FOLDER --episodes-per-task 36 --seed 0

No GPU and no display is needed: MuJoCo renders through EGL (Debian: `libegl1 libgl1-mesa-dri`), or through OSMesa
(Debian: `libosmesa6`) with `MUJOCO_GL=osmesa`. It takes two to three minutes on two cores. The same command gives the
same states and actions; pixels may differ by rounding between renderers.

Licences: MetaWorld (environments, meshes, experts) is MIT, MuJoCo and lerobot are Apache-2.0. No recording made by
others is used. The task sentences are those of lerobot's MetaWorld environment (`lerobot/envs/metaworld_config.json`).
"""

import argparse
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("MUJOCO_GL", "egl")  # MuJoCo reads it on import.
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # Nothing here needs the network; fail if that ever changes.

import metaworld
import mujoco
import numpy as np
from metaworld.policies import ENV_POLICY_MAP

TASKS = {
    "reach-v3": "Reach a goal position",
    "button-press-topdown-v3": "Press a button from the top",
    "push-v3": "Push the puck to a goal",
}
IMAGE_SIZE = 224  # Pixels per side: the input size of pi0's image encoder, so nothing resizes between file and model.
CAMERA = "corner2"
CAMERA_POSITION = (0.75, 0.075, 0.7)  # Metres; as in lerobot, nearer to the table than MetaWorld's default.
CAMERA_INDEX = 2  # Row of `model.cam_pos` that lerobot overwrites; it is `corner2` in every MetaWorld scene.
OFFSAMPLES = 4  # Anti-aliasing samples: the goal is six pixels wide, and jagged edges also cost video bytes.
CONTROL_HZ = 80
HOLD = 4  # Control steps per action: the experts still always succeed, with a quarter of the frames.
FPS = CONTROL_HZ // HOLD  # Decisions, and so recorded frames, per second.
MAX_DECISIONS = 60  # Three times the slowest expert's. MetaWorld itself stops after 500 control steps (125 decisions).
DECISIONS_AFTER_SUCCESS = 3  # Enough to teach the policy to stay; more would be idle frames.
IMAGE_SHAPE = (IMAGE_SIZE, IMAGE_SIZE, 3)
COMMAND = "uv run --group record python examples/record_metaworld.py"
FEATURES = {
    "observation.image": {"dtype": "video", "shape": IMAGE_SHAPE, "names": ["height", "width", "channels"]},
    "observation.state": {"dtype": "float32", "shape": (4,), "names": ["x", "y", "z", "gripper_opening"]},
    "action": {"dtype": "float32", "shape": (4,), "names": ["dx", "dy", "dz", "gripper_effort"]},
}
# A key frame every 5 frames keeps random reads fast and, at the same file size, small objects much sharper than one
# every 2. No B-frames: lerobot concatenates episodes by stream copy, which then keeps every timestamp. More bits for
# colour, by which the goals stand out, and none for reproducing the grain of the table.
X264_OPTIONS = {"bf": 0, "x264-params": "chroma-qp-offset=-4:psy=0"}
VIDEO = {"vcodec": "h264", "g": 5, "crf": 26, "preset": "veryslow", "extra_options": X264_OPTIONS}


def make_env(task: str) -> Any:
    """Make the MetaWorld environment of `task`, a key of `TASKS`, with new random objects and goal at each `reset`.

    Its observation includes the goal, which the expert needs; a policy should see only `render` and possibly `state`.
    """
    benchmark = metaworld.MT1(task, seed=42)  # The seed selects a list of goals, which is not used.
    env = benchmark.train_classes[task]()
    env.set_task(benchmark.train_tasks[0])
    env._freeze_rand_vec = False  # Otherwise each reset repeats the goal of `set_task`.
    env.seeded_rand_vec = True  # Use the generator that `env.seed` seeds, not NumPy's global one.
    env.model.cam_pos[CAMERA_INDEX] = CAMERA_POSITION
    env.model.vis.quality.offsamples = OFFSAMPLES
    return env


def make_renderer(env: Any) -> mujoco.Renderer:
    """Make the off-screen renderer for `render`, without shadows and reflections, which only cost time."""
    renderer = mujoco.Renderer(env.model, height=IMAGE_SIZE, width=IMAGE_SIZE)
    renderer.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
    renderer.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
    return renderer


def reset(env: Any, seed: int) -> np.ndarray:
    """Start an episode and return its observation, float64 [39]; objects and goal depend on the seed alone."""
    env.seed(seed)
    observation, _ = env.reset()
    # MetaWorld moves the goal after its last forward pass; without this one, the first image shows the wrong goal.
    mujoco.mj_forward(env.model, env.data)
    return observation


def render(env: Any, renderer: mujoco.Renderer) -> np.ndarray:
    """Return the current camera image, uint8 [IMAGE_SIZE, IMAGE_SIZE, 3], RGB, upright."""
    renderer.update_scene(env.data, camera=CAMERA)
    return np.ascontiguousarray(renderer.render()[::-1, ::-1])  # `corner2` is mounted upside down.


def state(observation: np.ndarray) -> np.ndarray:
    """Return the recorded state, float32 [4]: hand x, y, z in metres and gripper opening from 0 to 1."""
    return observation[:4].astype(np.float32)


def step_held(env: Any, action: np.ndarray) -> tuple[np.ndarray, bool]:
    """Execute one decision, clipped to [-1, 1], for `HOLD` control steps.

    Args:
        env: An environment of `make_env`.
        action: float32 [4]: three hand displacements in centimetres per control step, then the gripper effort.

    Returns:
        The next observation, float64 [39], and whether the task was solved at any of these control steps.
    """
    action = np.clip(action, -1.0, 1.0)
    solved = False
    for _ in range(HOLD):
        observation, _, _, _, info = env.step(action)
        solved |= bool(info["success"])
    return observation, solved


def episode_seed(seed: int, task_index: int, attempt: int) -> int:
    """Return the seed of one episode. Evaluate with another `seed` than in recording, so that no scene repeats."""
    return seed * 1_000_000 + task_index * 10_000 + attempt


def expert_episode(env: Any, renderer: mujoco.Renderer, task: str, seed: int) -> list[dict[str, Any]] | None:
    """Let the scripted expert play one episode, starting from `reset(env, seed)`.

    Returns:
        One frame per decision for `LeRobotDataset.add_frame`: the observation before it and the executed action. None
        if the expert failed.
    """
    expert = ENV_POLICY_MAP[task]()
    observation = reset(env, seed)
    frames: list[dict[str, Any]] = []
    decisions_left: int | None = None  # None until the task is solved.
    while decisions_left != 0:
        if decisions_left is None and len(frames) == MAX_DECISIONS:
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # The experts warn that their action will be clipped; it is, below.
            action = expert.get_action(observation)
        # Clip and round before executing, so that the file contains exactly the executed action.
        action = np.clip(action, -1.0, 1.0).astype(np.float32)
        seen = {"observation.image": render(env, renderer), "observation.state": state(observation)}
        frames.append({**seen, "action": action, "task": TASKS[task]})
        observation, solved = step_held(env, action)
        if decisions_left is not None:
            decisions_left -= 1
        elif solved:
            decisions_left = DECISIONS_AFTER_SUCCESS
    return frames


def expert_episodes(episodes_per_task: int, seed: int) -> Iterator[list[dict[str, Any]]]:
    """Yield successful episodes; tasks alternate, so that any contiguous range of episodes contains all of them."""
    envs = {task: make_env(task) for task in TASKS}
    renderers = {task: make_renderer(env) for task, env in envs.items()}
    attempts = dict.fromkeys(TASKS, 0)
    try:
        for _ in range(episodes_per_task):
            for task_index, task in enumerate(TASKS):
                frames = None
                while frames is None:
                    scene = episode_seed(seed, task_index, attempts[task])
                    frames = expert_episode(envs[task], renderers[task], task, scene)
                    attempts[task] += 1
                yield frames
    finally:
        for renderer in renderers.values():
            renderer.close()  # EGL reports errors if it is torn down at interpreter exit.
        print("attempts per task:", attempts)


def readme(episodes: int, frames: int, seed: int) -> str:
    """Return the dataset card."""
    tasks = ", ".join(f"{name} ({sentence})" for name, sentence in TASKS.items())
    return f"""# metaworld_3tasks

{episodes} episodes, {frames} frames at {FPS} Hz, in LeRobot v3.0 format and the schema of `lerobot/metaworld_mt50`.
Tasks, in turn: {tasks}.

- `observation.image`: H.264 video, {IMAGE_SIZE} x {IMAGE_SIZE}, camera `{CAMERA}` placed as in lerobot.
- `observation.state`: float32 [4], hand x, y, z in metres and gripper opening (0 to 1).
- `action`: float32 [4], hand displacement in cm per control step and gripper effort, clipped to [-1, 1] as executed.

Recorded by this project: MetaWorld 3.1.1's scripted experts in MuJoCo, each action held for {HOLD} control steps of
{CONTROL_HZ} Hz; successful episodes only; random objects and goals in each episode. Command:

    {COMMAND} --output FOLDER --episodes-per-task {episodes // len(TASKS)} --seed {seed}

Licence: MIT, as is MetaWorld, whose scenes the images show.
"""


def main() -> None:
    """Record to a temporary folder, then rename it, so that the output is either complete or absent."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder to create; it must not exist")
    parser.add_argument("--episodes-per-task", type=int, default=36)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    partial = args.output.with_name(f"{args.output.name}.partial")
    for path in (args.output, partial):
        if path.exists():
            parser.error(f"{path} exists; remove it or choose another --output")

    # Imported late: an evaluation that imports this file needs neither lerobot nor torch.
    import av
    import datasets
    from lerobot.configs.video import RGBEncoderConfig
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    av.logging.set_libav_level(av.logging.ERROR)  # Otherwise x264 prints 20 lines of statistics per episode.
    datasets.disable_progress_bars()  # Otherwise there is one bar per episode.
    dataset = LeRobotDataset.create(
        repo_id=f"local/{args.output.name}",
        fps=FPS,
        features=FEATURES,
        root=partial,
        robot_type="sawyer",
        video_backend="pyav",  # Only for reading, which is not done here; torchcodec needs a system FFmpeg.
        rgb_encoder=RGBEncoderConfig(**VIDEO),
        metadata_buffer_size=10_000,  # One row group for all episodes; each group costs 20 KB of column headers.
        encoder_threads=1,  # x264's output depends on the number of threads; one makes the file reproducible.
    )
    try:
        for frames in expert_episodes(args.episodes_per_task, args.seed):
            for frame in frames:
                dataset.add_frame(frame)
            dataset.save_episode()
        dataset.finalize()
        shutil.rmtree(partial / "images", ignore_errors=True)  # lerobot's empty staging folder.
        (partial / "README.md").write_text(readme(dataset.num_episodes, dataset.num_frames, args.seed))
        for path in partial.rglob("*"):  # lerobot creates videos as temporary files, readable only by their owner.
            path.chmod(0o755 if path.is_dir() else 0o644)
        partial.rename(args.output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    print(f"{args.output}: {dataset.num_episodes} episodes, {dataset.num_frames} frames")


if __name__ == "__main__":
    main()
