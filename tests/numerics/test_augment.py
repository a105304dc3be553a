"""Changed images against the reference's, from the numbers that it drew."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from rlinf_plugins_openpi.inputs.augmentation import OpenpiAugmentationConfig
from rlinf_plugins_openpi.model.augment import augment
from rlinf_plugins_openpi.model.dimensions import CAMERAS

TOLERANCE = 4e-5
"""On a scale of [-1, 1]."""
GEOMETRY = ("crop_cy", "crop_cx", "theta")
COLORS = ("jitter_applied", "brightness", "contrast", "hue")


class Recorded:
    def __init__(self, folder):
        params = json.loads((folder / "meta.json").read_text())["params"]
        self.cameras = [camera for camera in CAMERAS if camera in params]
        assert set(self.cameras) == set(params)
        moving = [camera for camera in self.cameras if "crop_cy" in params[camera][0]]
        assert moving == self.cameras[: len(moving)]
        self.images = torch.stack([read(folder / f"in_{c}.png", len(params[c])) for c in self.cameras], dim=1)
        self.moving = moving
        self.geometry = numbers(params, self.cameras, GEOMETRY)  # NaN for wrist cameras, which must not be read.
        self.colors = numbers(params, self.cameras, COLORS)
        self.expected = np.load(folder / "out_sub4.npz")


def augmented(recorded):
    """What the registered class makes of the recorded numbers."""
    draws = {
        name: {"openpi.crop_and_rotation": recorded.geometry[:, i], "openpi.color_jitter": recorded.colors[:, i]}
        for i, name in enumerate(recorded.cameras)
    }
    return augment(recorded.images, draws, {"openpi": OpenpiAugmentationConfig()})


def read(path, count):
    """Images that stand below one another in one file."""
    stacked = np.array(Image.open(path))
    return torch.from_numpy(stacked.reshape(count, -1, *stacked.shape[1:]))


def numbers(params, cameras, keys):
    """[B, cameras, keys]."""
    table = [[[float(image.get(key, "nan")) for key in keys] for image in params[camera]] for camera in cameras]
    return torch.tensor(table).movedim(0, 1)


@pytest.fixture
def recorded(augment_case):
    return Recorded(augment_case)


def test_changed_images_are_the_references(recorded, report):
    ours = augmented(recorded)
    assert ours.dtype == torch.float32
    for index, camera in enumerate(recorded.cameras):
        theirs = recorded.expected[f"out_sub4/{camera}"]
        assert ours[:, index, ::4, ::4].shape == theirs.shape
        distance = np.abs(ours[:, index, ::4, ::4].numpy() - theirs).max()
        report(f"augment/{camera}", f"{len(theirs)} images", distance, TOLERANCE)


def test_images_that_change_do_change(recorded):
    """A distance of nothing from nothing would pass above."""
    ours, before = augmented(recorded), recorded.images / 127.5 - 1
    change = (ours - before).abs().amax((2, 3, 4))
    moved = torch.zeros_like(change, dtype=torch.bool)
    moved[:, : len(recorded.moving)] = True
    assert ((change > 1e-3) == (moved | recorded.colors[..., 0].bool())).all()
