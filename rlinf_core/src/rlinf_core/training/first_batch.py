"""Images of a run's first batch as the model sees them, for reports and trackers: `<run>/first_batch/*.png`.

Torch-free, except for a policy whose `illustrate` augments images with torch.
"""

from __future__ import annotations

import io
import re
import shutil
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from rlinf_core.contract.run import RunConfig
from rlinf_core.data.loading.encoding import encode_rows, read_rows
from rlinf_core.data.loading.micro_batches import MicroBatches
from rlinf_core.data.loading.sampling import sample_generator
from rlinf_core.data.sample import Sample
from rlinf_core.errors import UserError
from rlinf_core.files import write_bytes
from rlinf_core.results import FIRST_BATCH
from rlinf_core.terminal import warn

SAMPLES = 4
"""Samples of the batch that are shown."""
Pixels = NDArray[np.uint8]


def save_first_batch(run: RunConfig, batches: MicroBatches) -> None:
    """Write the images of the first samples of step 1, after augmentation; nothing for policies without images.

    Images are for people: a run whose images cannot be read or written goes on, and its loader reports what is wrong.

    Args:
        run: The run.
        batches: Its micro batches, on rank 0.
    """
    folder = run.folder / FIRST_BATCH
    try:
        shutil.rmtree(folder, ignore_errors=True)
        for name, pixels in _first_images(run, batches):
            folder.mkdir(parents=True, exist_ok=True)
            write_bytes(folder / f"{name}.png", as_png(pixels))
    except UserError:
        return
    except Exception as error:  # A policy's `illustrate` is a plugin's code, which `rlinf inspect` shows in full.
        warn(f"images of the first batch are missing: {type(error).__name__}: {error}")


def as_png(pixels: Pixels) -> bytes:
    """An image, [height, width, 3] in RGB, as PNG."""
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def _first_images(run: RunConfig, batches: MicroBatches) -> Iterator[tuple[str, Pixels]]:
    """Name and pixels of each camera of the first samples."""
    numbers, rows = batches.global_batch(0)
    for position, (number, row) in enumerate(zip(numbers[:SAMPLES].tolist(), rows[:SAMPLES].tolist(), strict=True)):
        source = batches.sources[number]
        (sample,) = encode_rows(source.rows, [row], read_rows(source.rows, [row]), source.pipeline)
        if not sample.get("images"):
            return
        for camera, pixels in _as_seen(run, sample, position).items():
            where = f"{source.name}_" if source.name else ""
            yield re.sub(r"[^\w.-]", "_", f"sample{position + 1}_{where}{camera}"), pixels


def _as_seen(run: RunConfig, sample: Sample, position: int) -> dict[str, Pixels]:
    """Each camera's image as the model gets it in step 1."""
    seen = {name: np.asarray(pixels) for name, pixels in sample["images"].items()}
    draws = {"step 1": run.policy.draw(sample_generator(run.seed, 0, position))}
    for camera in run.policy.illustrate(sample, draws).cameras:
        if camera.name in seen and camera.pictures:
            seen[camera.name] = camera.pictures[-1].pixels
    return {name: pixels for name, pixels in seen.items() if pixels.dtype == np.uint8 and pixels.ndim == 3}
