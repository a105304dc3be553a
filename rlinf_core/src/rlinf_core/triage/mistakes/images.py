"""Mistakes that are made with images: flips, rotations, channels, cameras, crops, aspect ratios, brightness."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import combinations, permutations
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
SWAPPED = "have red and blue swapped (BGR, as OpenCV reads them)"
ZOOMS = (0.5, 0.5625, 0.6667, 0.75, 0.8, 0.9, 1.0, 1.1111, 1.25, 1.3333, 1.5, 1.7778, 2.0)
"""Factors by which an image may be stretched: those of common aspect ratios and crops."""
OTHER_CONTRAST, OTHER_MEAN = 0.3, 0.1
"""Least difference of a logarithm of the contrast, or of the mean brightness, that is a mistake."""
OTHER_GAMMA, OTHER_TINT = 0.3, 0.15
"""Least logarithm of a gamma, and of a channel's mean relative to the other channels', that is a mistake."""
CROPS = (0.6667, 0.75, 0.8, 0.9, 1.0, 1.1111, 1.25, 1.3333, 1.5)
"""Factors of crops about another point than the centre."""
OFFSETS = (-0.25, -0.1875, -0.125, -0.0625, 0.0, 0.0625, 0.125, 0.1875, 0.25)
"""Where their centre may be, relative to the size."""
REGISTERED = 4
"""Crops about another point that are tried: those with which the mean images agree best."""
MOST_CAMERAS = 4
"""Cameras of which all permutations are tried; of more, swaps of two."""


def swap_channels(images: Images) -> Images:
    """RGB <-> BGR."""
    return images[..., ::-1]


def same(images: Images) -> Images:
    """The images unchanged."""
    return images


def zoom(images: Images, vertical: float, horizontal: float, down: float = 0.0, right: float = 0.0) -> Images:
    """Stretch images; what comes from outside is NaN in small ones, black in full-size ones.

    Args:
        images: [..., height, width, 3].
        vertical: Factor of the height; 2 shows half of it.
        horizontal: Factor of the width.
        down: What is shown is so far below the centre, relative to the height.
        right: ... and so far to the right, relative to the width.
    """
    height, width = images.shape[-3:-1]
    if images.ndim == 3 and images.dtype == np.uint8:
        box = width * (0.5 - 0.5 / horizontal + right), height * (0.5 - 0.5 / vertical + down)
        data = (1 / horizontal, 0, box[0], 0, 1 / vertical, box[1])
        picture = Image.fromarray(np.ascontiguousarray(images))
        return np.asarray(picture.transform((width, height), Image.Transform.AFFINE, data, Image.Resampling.BILINEAR))
    rows = _resampling(height, vertical, down)
    columns = _resampling(width, horizontal, right)
    known = ~np.isnan(images)
    seen = np.where(known, images, 0)
    stretched = np.einsum("ih,...hwc,jw->...ijc", np.nan_to_num(rows), seen, np.nan_to_num(columns), optimize=True)
    stretched[..., np.isnan(rows).any(1), :, :] = np.nan
    stretched[..., :, np.isnan(columns).any(1), :] = np.nan
    if not known.all():
        weight = np.einsum("ih,...hwc,jw->...ijc", np.nan_to_num(rows), known, np.nan_to_num(columns), optimize=True)
        stretched[weight < 0.99] = np.nan
    return np.asarray(stretched, np.float32)


def _resampling(size: int, factor: float, offset: float) -> NDArray[np.float32]:
    """[size, size], weights that stretch about the centre, averaging where they shrink; NaN for rows from outside."""
    edges = (np.arange(size + 1) - size / 2) / factor + size * (0.5 + offset)
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
        there, here = reference.images[camera], site.images[camera]
        yield from _turned(camera)
        yield from _stretched([camera])
        yield from _moved([camera], reference, site)
        yield from _brightness(camera, there, here)
    if len(cameras) > 1:
        yield from _several_cameras(cameras)
        yield from _moved(cameras, reference, site)
        yield from _swapped(cameras)


def _correct(
    cameras: Sequence[str],
    mistake: str,
    doing: str,
    change: ImageChange,
    complexity: float = 1.0,
    way_out: str = "",
    every: bool = True,
) -> Correction:
    named = _named(cameras, every)
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
    yield _correct([camera], SWAPPED, "swapping red and blue of {}", swap_channels)


def _both(change: ImageChange, images: Images) -> Images:
    return swap_channels(change(images))


def _named(cameras: Sequence[str], every: bool) -> str:
    if len(cameras) == 1:
        return f"camera {cameras[0]!r}"
    return "all cameras" if every else f"cameras {' and '.join(map(repr, cameras))}"


def _several_cameras(cameras: Sequence[str]) -> Iterator[Correction]:
    # One mistake in code that handles all cameras is as simple as one in the code of a single camera.
    every = tuple(cameras)
    pairs = list(combinations(cameras, 2)) if 2 < len(cameras) <= MOST_CAMERAS else []
    for chosen in (every, *pairs):
        for mistake, (doing, change) in TURNS.items():
            yield _correct(chosen, mistake, doing, change, every=chosen == every)
        yield _correct(chosen, SWAPPED, "swapping red and blue of {}", swap_channels, every=chosen == every)
    yield from _stretched(cameras)


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


def _moved(cameras: Sequence[str], reference: Rows, site: Rows) -> Iterator[Correction]:
    """Crops about another point than the centre: those with which the mean images agree best."""
    wanted = np.stack([reference.images[camera].mean(0) for camera in cameras])
    mean = np.stack([site.images[camera].mean(0) for camera in cameras])
    found = []
    for factor in CROPS:
        edge = 0.5 * abs(1 - 1 / factor)  # Where a crop has an edge in common with the whole image.
        offsets = sorted({*OFFSETS, edge, -edge})
        for down in offsets:
            for right in offsets:
                if not (down or right) or max(abs(down), abs(right)) > max(edge, 0.125) + 1e-3:
                    continue
                moved = zoom(mean, factor, factor, down, right)
                known = ~np.isnan(moved)
                if known.mean() > 0.3:
                    found.append((float(np.square(moved[known] - wanted[known]).mean()), factor, down, right))
    for _, factor, down, right in sorted(found)[:REGISTERED]:
        size = "" if factor == 1 else f" and {'larger' if factor < 1 else 'smaller'}"
        yield _correct(
            cameras,
            f"show another part of the scene than in training: theirs is moved{size} (cropped elsewhere, or the camera "
            "was moved)",
            f"zooming {{}} by {factor:.3g}, moved by {down:+.0%} of the height and {right:+.0%} of the width",
            partial(zoom, vertical=factor, horizontal=factor, down=down, right=right),
            2.0,
            "Crop the images as the training data were, and put the camera where it was",
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
    powers = {2.2, 1 / 2.2}
    if 0.01 < mean < 0.99 and 0.01 < wanted < 0.99:
        fitted = float(np.log(wanted) / np.log(mean))
        powers |= {fitted} if abs(np.log(fitted)) > OTHER_GAMMA else set()
    for power in sorted(powers):
        name = "brighter" if power > 1 else "darker"
        text = f"are {name} by a gamma of {max(power, 1 / power):.2g}"
        yield _correct([camera], text, "undoing the gamma of {}", partial(gamma, power=power), 2.0)
    yield _correct([camera], "are negatives (inverted values)", "inverting {}", _inverted)
    colors = there.mean((0, 1, 2)) / np.maximum(here.mean((0, 1, 2)), 1e-3)
    if np.ptp(np.log(np.maximum(colors, 1e-3))) > OTHER_TINT:
        yield _correct(
            [camera],
            f"have a tint: red, green and blue are {', '.join(f'{1 / one:.2f}' for one in colors)} of training's",
            "balancing the colors of {}",
            partial(balance, gains=colors),
            2.5,
            "Set the camera's white balance as in training, to a fixed value",
        )


def balance(images: Images, gains: NDArray[np.floating]) -> Images:
    """Scale the channels."""
    if images.dtype == np.uint8:
        return np.asarray(np.clip(images * gains, 0, 255).astype(np.uint8))
    return np.asarray(np.clip(images * gains, 0, 1).astype(np.float32))


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
