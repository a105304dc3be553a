"""Tiny LeRobot datasets, written by lerobot's own writer; a moving square identifies the frame of an image."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rlinf_core.errors import UserError
from rlinf_core.testing.lerobot_v2 import write_v2

FPS = 10
"""Frames per second."""
SIZE = 32
"""Width and height in pixels."""
TASKS = ("push the block", "open the drawer")
CAMERAS = ("observation.images.front", "observation.images.wrist")
VECTORS = {"observation.state": 3, "action": 2}


@dataclass(frozen=True)
class TinyDataset:
    """What was written to a dataset, to compare with what is read."""

    root: Path
    vectors: dict[str, list[NDArray[np.float32]]]
    """Column -> one [frames, width] per episode."""
    images: list[NDArray[np.uint8]]
    """One [frames, cameras, SIZE, SIZE, 3] per episode."""
    tasks: list[str]
    """One per episode."""

    @property
    def states(self) -> list[NDArray[np.float32]]:
        """The column `observation.state`."""
        return self.vectors["observation.state"]

    @property
    def actions(self) -> list[NDArray[np.float32]]:
        """The column `action`."""
        return self.vectors["action"]


def picture(episode: int, frame: int, camera: int) -> NDArray[np.uint8]:
    """Uint8 [SIZE, SIZE, 3]: a square whose position encodes the frame, in colours of the episode and the camera."""
    image = np.full((SIZE, SIZE, 3), ((40 + 60 * camera) % 256, 20 * episode % 240, 90), np.uint8)
    left = 2 * frame % (SIZE - 8)
    image[8:16, left : left + 8] = (250, (200 - 100 * camera) % 256, 30 * episode % 240)
    return image


def write_tiny_dataset(
    root: Path,
    *,
    cameras: Sequence[str] = CAMERAS,
    vectors: Mapping[str, int] = VECTORS,
    lengths: Sequence[int] = (9, 7, 12, 8),
    videos: bool = False,
    version: Literal["v2.0", "v2.1", "v3.0"] = "v3.0",
    seed: int = 0,
    **create: Any,
) -> TinyDataset:
    """Write a dataset of random numbers and small images; two tasks alternate by episode.

    Args:
        root: Folder to write; it must not exist.
        cameras: Image columns.
        vectors: Columns of numbers with their widths.
        lengths: Frames of each episode; images repeat after 12.
        videos: Images as AV1 video instead of PNG in the data files.
        version: Format; older ones are converted from v3.0, the only one that lerobot's writer supports.
        seed: Seed of the numbers.
        create: Further arguments of `LeRobotDataset.create`.

    Raises:
        UserError: lerobot is not installed.
    """
    root, target = Path(root), Path(root)
    if version != "v3.0":
        root = target.with_name(f"{target.name}_v30")
    shape = {"shape": (SIZE, SIZE, 3), "names": ["height", "width", "channels"]}
    features: dict[str, Any] = {name: {"dtype": "video" if videos else "image"} | shape for name in cameras}
    features |= {
        name: {"dtype": "float32", "shape": (width,), "names": [f"{name}{i}" for i in range(width)]}
        for name, width in vectors.items()
    }
    dataset = _lerobot_dataset().create("tests/tiny", FPS, features, root=root, use_videos=videos, **create)
    generator = np.random.default_rng(seed)
    written = TinyDataset(target, {name: [] for name in vectors}, [], [])
    for episode, length in enumerate(lengths):
        frames = {name: generator.normal(size=(length, width)).astype(np.float32) for name, width in vectors.items()}
        pictures = [[picture(episode, frame, camera) for camera in range(len(cameras))] for frame in range(length)]
        task = TASKS[episode % 2]
        for frame in range(length):
            numbers = {name: values[frame] for name, values in frames.items()}
            dataset.add_frame(numbers | {"task": task} | dict(zip(cameras, pictures[frame], strict=True)))
        dataset.save_episode()
        for name, values in frames.items():
            written.vectors[name].append(values)
        written.images.append(np.array(pictures, np.uint8))
        written.tasks.append(task)
    dataset.finalize()
    if version != "v3.0":
        write_v2(root, target, version)
        shutil.rmtree(root)
    return written


def _lerobot_dataset() -> Any:
    """The class that writes datasets, the only import from lerobot in this project."""
    try:
        from lerobot.datasets.lerobot_dataset import LeRobotDataset
    except ImportError as error:
        raise UserError(
            f"tiny datasets are written by lerobot, which cannot be imported ({error}): "
            "pip install 'rlinf-core[lerobot]'"
        ) from error
    return LeRobotDataset
