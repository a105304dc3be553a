"""Resizing with padding against the reference's PIL path, pixel for pixel."""

import numpy as np
import pytest
from golden import GOLDEN
from PIL import Image

from rlinf_plugins_openpi.transforms import IMAGE_SIZE, ResizeWithPad

CASES = sorted(path.stem.removeprefix("pil_") for path in (GOLDEN / "resize").glob("pil_*.png"))


@pytest.mark.parametrize("case", CASES)
def test_resize_is_the_references(case, report):
    source, expected = (np.array(Image.open(GOLDEN / "resize" / f"{kind}_{case}.png")) for kind in ("in", "pil"))
    out = ResizeWithPad(IMAGE_SIZE, IMAGE_SIZE)({"images": {"base_0_rgb": source}})["images"]["base_0_rgb"]
    assert out.shape == expected.shape
    distance = int(np.abs(out.astype(int) - expected).max())
    report(f"resize/pil_{case}", "grey levels", distance, 0)
