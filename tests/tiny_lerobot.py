"""Tiny LeRobot v3.0 datasets, written by lerobot's own writer; a moving square shows which frame a picture is."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

FPS = 10
SIZE = 32
TASKS = ("push the block", "open the drawer")
CAMERAS = ("observation.images.front", "observation.images.wrist")


@dataclass(frozen=True)
class Written:
    """What went into a dataset, to compare with what comes out."""

    root: Path
    states: list[np.ndarray]
    """One [frames, 3] an episode."""
    actions: list[np.ndarray]
    """One [frames, 2] an episode."""
    images: list[np.ndarray]
    """One uint8 [frames, cameras, SIZE, SIZE, 3] an episode."""
    tasks: list[str]
    """One an episode."""


def picture(episode: int, frame: int, camera: int) -> np.ndarray:
    """Uint8 [SIZE, SIZE, 3]: a square whose place tells the frame and whose colours tell the episode and the camera."""
    image = np.full((SIZE, SIZE, 3), (40 + 60 * camera, 20 * episode, 90), np.uint8)
    left = 2 * frame % (SIZE - 8)
    image[8:16, left : left + 8] = (250, 200 - 100 * camera, 30 * episode)
    return image


def write_dataset(
    root: Path, *, videos: bool, lengths: tuple[int, ...] = (9, 7, 12, 8), seed: int = 0, **create: object
) -> Written:
    """Write a dataset with two cameras, a 3-number state and a 2-number action; tasks alternate by episode."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    shape = {"shape": (SIZE, SIZE, 3), "names": ["height", "width", "channels"]}
    features = dict.fromkeys(CAMERAS, {"dtype": "video" if videos else "image"} | shape) | {
        "observation.state": {"dtype": "float32", "shape": (3,), "names": ["x", "y", "z"]},
        "action": {"dtype": "float32", "shape": (2,), "names": ["dx", "dy"]},
    }
    dataset = LeRobotDataset.create("tests/tiny", FPS, features, root=root, use_videos=videos, **create)
    generator = np.random.default_rng(seed)
    written = Written(root, [], [], [], [])
    for episode, length in enumerate(lengths):
        written.states.append(generator.normal(size=(length, 3)).astype(np.float32))
        written.actions.append(generator.normal(size=(length, 2)).astype(np.float32))
        written.images.append(
            np.stack([[picture(episode, frame, camera) for camera in range(2)] for frame in range(length)])
        )
        written.tasks.append(TASKS[episode % 2])
        for frame in range(length):
            dataset.add_frame(
                {
                    "observation.state": written.states[-1][frame],
                    "action": written.actions[-1][frame],
                    "task": written.tasks[-1],
                }
                | {name: written.images[-1][frame, i] for i, name in enumerate(CAMERAS)}
            )
        dataset.save_episode()
    dataset.finalize()
    return written
