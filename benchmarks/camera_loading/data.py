"""Synthetic LeRobot datasets that resemble camera recordings: texture, motion and noise, the same in every run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

CAMERAS = ("observation.images.front", "observation.images.wrist")
WIDTHS = {"observation.state": 8, "action": 7}
FPS, SIZE = 10, 256


@dataclass(frozen=True)
class Recording:
    """How much to record, and how images are stored."""

    episodes: int
    frames: int
    """Frames per episode."""
    encoder: Mapping[str, Any] | None
    """Changes to lerobot's default (AV1, a key frame every second frame, crf 30); None: PNG in the data files."""


DATASETS = {
    "h264": Recording(8, 100, {"vcodec": "h264"}),
    "av1": Recording(8, 100, {}),
    "h264_long_gop": Recording(4, 250, {"vcodec": "h264", "g": 250}),
    "image": Recording(4, 60, None),
}


def write_dataset(root: Path, recording: Recording) -> None:
    """Write a LeRobot v3.0 dataset of two cameras with lerobot's own writer."""
    from lerobot.configs import RGBEncoderConfig
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    videos = recording.encoder is not None
    picture = {
        "dtype": "video" if videos else "image",
        "shape": (SIZE, SIZE, 3),
        "names": ["height", "width", "channels"],
    }
    features: dict[str, Any] = dict.fromkeys(CAMERAS, picture)
    features |= {
        name: {"dtype": "float32", "shape": (width,), "names": [str(i) for i in range(width)]}
        for name, width in WIDTHS.items()
    }
    encoding: dict[str, Any] = {"use_videos": videos}
    if recording.encoder is not None:
        # Frames that do not fit into the queue are dropped.
        encoding |= {"streaming_encoding": True, "encoder_queue_maxsize": recording.frames + 1}
        encoding["rgb_encoder"] = RGBEncoderConfig(**recording.encoder)
    dataset = LeRobotDataset.create("benchmarks/cameras", FPS, features, root=root, **encoding)
    generator = np.random.default_rng(0)
    for episode in range(recording.episodes):
        scenes = [film(generator, recording.frames) for _ in CAMERAS]
        for frame in range(recording.frames):
            row = {name: generator.normal(size=width).astype(np.float32) for name, width in WIDTHS.items()}
            pictures = {camera: scene[frame] for camera, scene in zip(CAMERAS, scenes, strict=True)}
            dataset.add_frame(row | pictures | {"task": f"task {episode % 4}"})
        dataset.save_episode()
    dataset.finalize()


def film(generator: np.random.Generator, frames: int) -> NDArray[np.uint8]:
    """Uint8 [frames, SIZE, SIZE, 3]: a textured wall that drifts, a disc that circles, and the noise of a sensor."""
    wall = np.zeros((2 * SIZE, 2 * SIZE, 3), np.float32)
    for cells in (4, 16, 64, 256):
        patches = generator.normal(size=(cells, cells, 3)).astype(np.float32)
        wall += np.kron(patches, np.ones((2 * SIZE // cells, 2 * SIZE // cells, 1), np.float32)) / np.sqrt(cells)
    wall = ((wall - wall.min()) / (wall.max() - wall.min()) * 200 + 20).astype(np.int16)
    noise = generator.normal(0, 2, (2 * SIZE, 2 * SIZE, 1)).round().astype(np.int16)
    phases, (y, x) = generator.uniform(0, 2 * np.pi, 4), np.mgrid[:SIZE, :SIZE]
    pictures = np.empty((frames, SIZE, SIZE, 3), np.uint8)
    for frame in range(frames):
        top, left = (int(SIZE / 2 + SIZE / 4 * np.sin(frame / p + a)) for p, a in zip((25, 31), phases, strict=False))
        down, right = generator.integers(0, SIZE, 2)
        seen = wall[top : top + SIZE, left : left + SIZE] + noise[down : down + SIZE, right : right + SIZE]
        centre = SIZE / 2 + SIZE / 3 * np.array([np.sin(frame / 12 + phases[2]), np.cos(frame / 15 + phases[3])])
        seen[(y - centre[0]) ** 2 + (x - centre[1]) ** 2 < (SIZE / 8) ** 2] = (220, 60, 40)
        pictures[frame] = seen.clip(0, 255)
    return pictures
