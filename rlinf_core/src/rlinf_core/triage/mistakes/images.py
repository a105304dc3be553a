"""Mistakes that are made with images: flips, rotations, channels, cameras, crops, aspect ratios, brightness."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import permutations
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rlinf_core.triage.mistakes.corrections import Correction, ImageChange
from rlinf_core.triage.mistakes.rows import Rows

Images = NDArray[Any]

TURNS: Mapping[str, tuple[str, ImageChange]] = {
    "are rotated by 180°": ("rotating {} by 180°", lambda x: x[..., ::-1, ::-1, :]),
    "are upside down (flipped vertically)": ("flipping {} vertically", lambda x: x[..., ::-1, :, :]),
    "are mirrored (flipped horizontally)": ("flipping {} horizontally", lambda x: x[..., ::-1, :]),
    "are rotated by 90° clockwise": ("rotating {} by 90° counterclockwise", lambda x: np.rot90(x, 1, (-3, -2))),
    "are rotated by 90° counterclockwise": ("rotating {} by 90° clockwise", lambda x: np.rot90(x, -1, (-3, -2))),
    "are transposed (rows and columns swapped)": ("transposing {}", lambda x: np.swapaxes(x, -3, -2)),
    "are transposed along the other diagonal": (
        "transposing {} along the other diagonal",
        lambda x: np.swapaxes(x[..., ::-1, ::-1, :], -3, -2),
    ),
}
"""Mistake -> its correction in words, and as a function."""
ZOOMS = (0.5, 0.5625, 0.6667, 0.75, 0.8, 0.9, 1.0, 1.1111, 1.25, 1.3333, 1.5, 1.7778, 2.0)
"""Factors by which an image may be stretched: those of common aspect ratios and crops."""
OTHER_CONTRAST, OTHER_MEAN = 0.3, 0.1
"""Least difference of a logarithm of the contrast, or of the mean brightness, that is a mistake."""
MOST_CAMERAS = 4
"""Cameras of which all permutations are tried; of more, swaps of two."""


def swap_channels(images: Images) -> Images:
    """RGB <-> BGR."""
    return images[..., ::-1]


def same(images: Images) -> Images:
    """The images unchanged."""
    return images


def zoom(images: Images, vertical: float, horizontal: float) -> Images:
    """Stretch images about their centre; what comes from outside is NaN in small ones, black in full-size ones.

    Args:
        images: [..., height, width, 3].
        vertical: Factor of the height; 2 shows the middle half.
        horizontal: Factor of the width.
    """
    height, width = images.shape[-3:-1]
    if images.ndim == 3 and images.dtype == np.uint8:
        box = (0.5 * width * (1 - 1 / horizontal), 0.5 * height * (1 - 1 / vertical))
        data = (1 / horizontal, 0, box[0], 0, 1 / vertical, box[1])
        picture = Image.fromarray(np.ascontiguousarray(images))
        return np.asarray(picture.transform((width, height), Image.Transform.AFFINE, data, Image.Resampling.BILINEAR))
    rows = _resampling(height, vertical)
    columns = _resampling(width, horizontal)
    stretched = np.einsum("ih,...hwc,jw->...ijc", np.nan_to_num(rows), images, np.nan_to_num(columns), optimize=True)
    stretched[..., np.isnan(rows).any(1), :, :] = np.nan
    stretched[..., :, np.isnan(columns).any(1), :] = np.nan
    return np.asarray(stretched, np.float32)


def _resampling(size: int, factor: float) -> NDArray[np.float32]:
    """[size, size], weights that stretch about the centre, averaging where they shrink; NaN for rows from outside."""
    edges = (np.arange(size + 1) - size / 2) / factor + size / 2
    low, high = edges[:-1, None], edges[1:, None]
    pixels = np.arange(size)[None]
    if factor < 1:
        weights = np.clip(np.minimum(high, pixels + 1) - np.maximum(low, pixels), 0, None)
    else:
        weights = np.clip(1 - np.abs((low + high) / 2 - 0.5 - pixels), 0, None)
    outside = (low < -0.01) | (high > size + 0.01)
    weights = weights / np.maximum(weights.sum(1, keepdims=True), 1e-9)
    return np.where(outside, np.nan, weights).astype(np.float32)


def match_brightness(images: Images, gain: float, offset: float) -> Images:
    """Scale and shift the values; `offset` is relative to the full range."""
    if images.dtype == np.uint8:
        return np.clip(images.astype(np.float32) * gain + 255 * offset, 0, 255).astype(np.uint8)
    return np.clip(images * gain + offset, 0, 1)


def gamma(images: Images, power: float) -> Images:
    """Raise the values, from 0 to 1, to a power."""
    if images.dtype == np.uint8:
        return (255 * (images / 255.0) ** power).round().astype(np.uint8)
    return np.asarray(images**power)


def image_corrections(reference: Rows, site: Rows) -> Iterator[Correction]:
    """Corrections of all mistakes with images that could be in these rows."""
    cameras = [camera for camera in reference.images if camera in site.images]
    for camera in cameras:
        yield from _turned(camera)
        yield from _stretched([camera])
        yield from _brightness(camera, reference.images[camera], site.images[camera])
    if len(cameras) > 1:
        yield from _all_cameras(cameras)
        yield from _swapped(cameras)


def _correct(
    cameras: Sequence[str], mistake: str, doing: str, change: ImageChange, complexity: float = 1.0, way_out: str = ""
) -> Correction:
    named = f"camera {cameras[0]!r}" if len(cameras) == 1 else "all cameras"
    return Correction(
        mistake=f"images of {named} {mistake}",
        doing=doing.format(named),
        way_out=way_out or f"Apply it to what the policy gets from {named}: {doing.format('the images')}",
        images={camera: (camera, change) for camera in cameras},
        complexity=complexity,
    )


def _turned(camera: str) -> Iterator[Correction]:
    for mistake, (doing, change) in TURNS.items():
        yield _correct([camera], mistake, doing, change)
        both = f"{mistake}, and their red and blue channels are swapped"
        yield _correct([camera], both, f"{doing} and swapping red and blue", partial(_both, change), 2.0)
    yield _correct(
        [camera], "have red and blue swapped (BGR, as OpenCV reads them)", "swapping red and blue of {}", swap_channels
    )


def _both(change: ImageChange, images: Images) -> Images:
    return swap_channels(change(images))


def _all_cameras(cameras: Sequence[str]) -> Iterator[Correction]:
    # One mistake in code that handles all cameras is as simple as one in the code of a single camera.
    for mistake, (doing, change) in TURNS.items():
        yield _correct(cameras, mistake, doing, change)
    yield from _stretched(cameras)
    yield _correct(
        cameras, "have red and blue swapped (BGR, as OpenCV reads them)", "swapping red and blue of {}", swap_channels
    )


def _stretched(cameras: Sequence[str]) -> Iterator[Correction]:
    for vertical in ZOOMS:
        for horizontal in ZOOMS:
            if vertical == horizontal == 1 or (vertical != horizontal and 1 not in (vertical, horizontal)):
                continue
            mistake, doing = _stretch_in_words(vertical, horizontal)
            yield _correct(
                cameras,
                mistake,
                doing,
                partial(zoom, vertical=vertical, horizontal=horizontal),
                1.5,
                "Crop, pad and resize the images as the training data were: keep the aspect ratio, same field of view",
            )


def _stretch_in_words(vertical: float, horizontal: float) -> tuple[str, str]:
    if abs(vertical / horizontal - 1) < 1e-3:
        if vertical > 1:
            return (
                f"show more of the scene than in training (not cropped): the middle {1 / vertical:.0%} would match",
                "cropping {} to the middle " + f"{1 / vertical:.0%}",
            )
        return (
            f"show less of the scene than in training (cropped or zoomed by {1 / vertical:.3g})",
            "shrinking {} by " + f"{1 / vertical:.3g}",
        )
    ratio = horizontal / vertical
    squashed = "squashed horizontally" if ratio > 1 else "squashed vertically"
    return (
        f"are {squashed}, by {max(ratio, 1 / ratio):.3g}: another aspect ratio than in training",
        "stretching {} by " + f"{vertical:.3g} vertically and {horizontal:.3g} horizontally",
    )


def _brightness(camera: str, there: Images, here: Images) -> Iterator[Correction]:
    mean, spread = float(here.mean()), float(here.std())
    wanted, wide = float(there.mean()), float(there.std())
    # Renderers, codecs and daylight differ by less.
    if spread > 1e-6 and (abs(np.log(wide / spread)) > OTHER_CONTRAST or abs(mean - wanted) > OTHER_MEAN):
        gain = wide / spread
        change = partial(match_brightness, gain=gain, offset=wanted - gain * mean)
        how = f"mean is {mean:.3g} of the range, in training {wanted:.3g}; the deviation {spread:.3g} and {wide:.3g}"
        yield _correct(
            [camera],
            f"have another brightness or contrast: their {how}",
            "adjusting the brightness of {}",
            change,
            3.0,
            "Set the camera's exposure and gain as in training, and give the policy values from 0 to 255",
        )
    for power, name in ((2.2, "brighter"), (1 / 2.2, "darker")):
        yield _correct(
            [camera], f"are {name} by a gamma of 2.2", "undoing the gamma of {}", partial(gamma, power=power), 2.0
        )
    yield _correct([camera], "are negatives (inverted values)", "inverting {}", _inverted)


def _inverted(images: Images) -> Images:
    return 255 - images if images.dtype == np.uint8 else 1 - images


def _swapped(cameras: Sequence[str]) -> Iterator[Correction]:
    if len(cameras) <= MOST_CAMERAS:
        orders: list[tuple[str, ...]] = list(permutations(cameras))[1:]
    else:
        orders = []
        for i in range(len(cameras)):
            for j in range(i):
                changed = list(cameras)
                changed[i], changed[j] = changed[j], changed[i]
                orders.append(tuple(changed))
    for order in orders:
        moved = [(camera, other) for camera, other in zip(cameras, order, strict=True) if camera != other]
        names = " and ".join(f"{camera!r}" for camera, _ in moved)
        yield Correction(
            mistake=f"cameras {names} are swapped",
            doing=f"swapping cameras {names}" if len(moved) == 2 else f"reordering cameras {names}",
            way_out="Connect each camera to its own name: "
            + ", ".join(f"what arrives as {other!r} is {camera!r}" for camera, other in moved),
            images={camera: (other, same) for camera, other in moved},
        )


def stuck_cameras(site: Rows, reference: Rows) -> Iterator[tuple[str, str]]:
    """Cameras whose images at the site are all one color or all the same, though those of training are not."""
    for camera, images in site.images.items():
        there = reference.images.get(camera)
        if there is None or not len(images):
            continue
        if images.max() <= 1.5 / 255 < there.max():
            how = "are black, or have values from 0 to 1 where 0 to 255 are expected"
            yield camera, f"images of camera {camera!r} {how}"
        elif images.std((1, 2, 3)).max() < 0.01 < there.std((1, 2, 3)).mean():
            yield camera, f"images of camera {camera!r} are of a single color"
        elif len(images) > 4 and np.ptp(images, axis=0).max() < 0.004 < np.ptp(there, axis=0).max():
            yield camera, f"images of camera {camera!r} never change"
    for camera in reference.images.keys() - site.images.keys():
        yield camera, f"camera {camera!r} is missing"
