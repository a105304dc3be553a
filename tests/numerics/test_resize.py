"""Resizing with padding against the reference: its pipeline's (PIL) pixel for pixel, and its model's own (JAX)."""

import numpy as np
import pytest
import torch
from golden import GOLDEN
from PIL import Image

from rlinf_plugins_openpi.inputs.transforms import ResizeWithPad
from rlinf_plugins_openpi.model.augment import normalise, resize_with_pad
from rlinf_plugins_openpi.model.dimensions import IMAGE_SIZE

FOLDER = GOLDEN / "resize"
CASES = sorted(path.stem.removeprefix("in_") for path in FOLDER.glob("in_*.png"))
IN_THE_MODEL = 1e-5
"""On a scale of [-1, 1]."""
ROUNDED_ELSEWHERE = 0.01
"""Share of the numbers that may be a grey level off: a half may come out on either side in float32."""


def read(kind, case):
    return np.array(Image.open(FOLDER / f"{kind}_{case}.png"))


@pytest.mark.parametrize("case", CASES)
def test_resize_is_the_references(case, report):
    source, expected = read("in", case), read("pil", case)
    out = ResizeWithPad(IMAGE_SIZE, IMAGE_SIZE)({"images": {"base_0_rgb": source}})["images"]["base_0_rgb"]
    assert out.shape == expected.shape
    distance = int(np.abs(out.astype(int) - expected).max())
    report(f"resize/pil_{case}", "grey levels", distance, 0)


@pytest.mark.parametrize("case", CASES)
def test_models_own_resize_is_the_references(case, report):
    source = torch.from_numpy(read("in", case))
    expected = np.load(FOLDER / "jax_f32_sub4.npz")[f"jax_f32_sub4_{case}"]
    ours = resize_with_pad(normalise(source), IMAGE_SIZE, IMAGE_SIZE)[::4, ::4].numpy()
    assert ours.shape == expected.shape
    report(f"resize/jax_f32_{case}", "on [-1, 1]", float(np.abs(ours - expected).max()), IN_THE_MODEL)


@pytest.mark.parametrize("case", CASES)
def test_models_own_resize_of_bytes_is_the_references(case, report):
    ours = resize_with_pad(torch.from_numpy(read("in", case)), IMAGE_SIZE, IMAGE_SIZE).numpy()
    expected = read("jax_u8", case)
    assert (ours.dtype, ours.shape) == (np.uint8, expected.shape)
    off = np.abs(ours.astype(int) - expected)
    report(f"resize/jax_u8_{case}", "grey levels", int(off.max()), 1)
    report(f"resize/jax_u8_{case}", "share of numbers off", float((off > 0).mean()), ROUNDED_ELSEWHERE)
