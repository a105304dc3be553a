"""Mistakes for `rlinf_core.testing.triage` to plant: in the site's rows, in an exported folder, in how chunks are run.

Each has a name and a few settings, so that the same kind of mistake can be planted in other cameras, numbers and units.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rlinf_core.errors import UserError, did_you_mean
from rlinf_core.testing.planted_data import Episode, Mistake

Images = NDArray[np.uint8]


@dataclass(frozen=True)
class Settings:
    """Which cameras, numbers and factor a mistake concerns."""

    cameras: Sequence[str] = ()
    """Image columns; empty: all, or as many as the mistake needs."""
    numbers: Sequence[int] = ()
    """Numbers of the state or the action; empty: those that the mistake usually concerns."""
    factor: float | None = None
    """The factor of units, sizes and rates; None: the usual one."""


@dataclass(frozen=True)
class Plant:
    """A mistake that can be planted."""

    name: str
    what: str
    """What it does, in one line."""
    test: str
    """The test of `rlinf triage` that should name it."""
    site: Callable[[Settings, Sequence[Episode]], Mistake] | None = None
    """Makes the mistake for episodes of the site."""
    folder: Callable[[Path, Settings], None] | None = None
    """Changes a copy of an exported folder."""
    arguments: Callable[[int], Sequence[str]] | None = None
    """Arguments of `rlinf triage`, from the length of a chunk."""
    live: bool = False
    """Export the live weights instead of the average."""


def _images(change: Callable[[Images], Images]) -> Callable[[Settings, Sequence[Episode]], Mistake]:
    """A mistake with the images of some cameras, [N, height, width, 3]."""

    def make(settings: Settings, episodes: Sequence[Episode]) -> Mistake:
        def mistake(one: Episode) -> Episode:
            chosen = settings.cameras or list(one.images)
            if unknown := sorted(set(chosen) - one.images.keys()):
                raise UserError(f"there is no camera {unknown[0]!r}{did_you_mean(unknown[0], one.images.keys())}")
            return replace(one, images={**one.images, **{column: change(one.images[column]) for column in chosen}})

        return mistake

    return make


def _numbers(
    key: Literal["state", "actions"],
    usual: Callable[[int], Sequence[int]],
    change: Callable[[NDArray[np.float32], float | None], NDArray[np.floating]],
) -> Callable[[Settings, Sequence[Episode]], Mistake]:
    """A mistake with some numbers, [N, chosen], of the state or the action."""

    def make(settings: Settings, episodes: Sequence[Episode]) -> Mistake:
        def mistake(one: Episode) -> Episode:
            values = np.array(getattr(one, key), np.float32)
            at = list(settings.numbers) or list(usual(values.shape[1]))
            values[:, at] = change(values[:, at], settings.factor)
            return replace(one, state=values) if key == "state" else replace(one, actions=values)

        return mistake

    return make


def _squashed(images: Images) -> Images:
    """The middle three quarters of the height, stretched to the whole."""
    height, width = images.shape[1:3]
    cut = height // 8
    return np.stack([np.asarray(Image.fromarray(one[cut : height - cut]).resize((width, height))) for one in images])


def _cropped(images: Images) -> Images:
    """Three quarters from the upper left corner, stretched to the whole."""
    height, width = images.shape[1:3]
    corner = images[:, : 3 * height // 4, : 3 * width // 4]
    return np.stack([np.asarray(Image.fromarray(one).resize((width, height))) for one in corner])


def _gray(images: Images) -> Images:
    """The luminance in all channels."""
    luminance = images @ np.array([0.299, 0.587, 0.114])
    return np.repeat(luminance.round().astype(np.uint8)[..., None], 3, -1)


def _frozen(images: Images) -> Images:
    """Each episode's first image in all of its rows."""
    return np.repeat(images[:1], len(images), 0)


def _of_one_camera(change: Callable[[Images], Images]) -> Callable[[Settings, Sequence[Episode]], Mistake]:
    def make(settings: Settings, episodes: Sequence[Episode]) -> Mistake:
        chosen = settings.cameras or list(episodes[0].images)[-1:]
        return _images(change)(replace(settings, cameras=chosen), episodes)

    return make


def _swap_cameras(settings: Settings, episodes: Sequence[Episode]) -> Mistake:
    columns = list(settings.cameras) or list(episodes[0].images)[:2]
    if len(columns) != 2:
        raise UserError("swapped-cameras needs a dataset with two cameras")
    a, b = columns
    return lambda one: replace(one, images={**one.images, a: one.images[b], b: one.images[a]})


def _quaternion(values: NDArray[np.float32]) -> Sequence[int]:
    """The first four neighbouring numbers of unit length."""
    for start in range(values.shape[1] - 3):
        if np.abs(np.linalg.norm(values[:, start : start + 4], axis=1) - 1).max() < 0.02:
            return range(start, start + 4)
    raise UserError("the state has no quaternion: name its four numbers with --numbers")


def _of_quaternion(
    change: Callable[[NDArray[np.float32]], NDArray[np.float32]],
) -> Callable[[Settings, Sequence[Episode]], Mistake]:
    def make(settings: Settings, episodes: Sequence[Episode]) -> Mistake:
        at = list(settings.numbers) or list(_quaternion(np.concatenate([one.state for one in episodes])))

        def mistake(one: Episode) -> Episode:
            state = one.state.copy()
            state[:, at] = change(state[:, at])
            return replace(one, state=state)

        return mistake

    return make


def _alternating(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """The opposite sign from the middle of an episode on."""
    sign = np.where(np.arange(len(values)) < len(values) // 2, 1, -1)
    return np.asarray(values * sign[:, None], np.float32)


def _absolute(settings: Settings, episodes: Sequence[Episode]) -> Mistake:
    def mistake(one: Episode) -> Episode:
        width = min(one.state.shape[1], one.actions.shape[1] - 1)
        at = list(settings.numbers) or list(range(min(width, 3)))
        actions = one.actions.copy()
        actions[:, at] += one.state[:, at]
        return replace(one, actions=actions)

    return mistake


def _other_task(settings: Settings, episodes: Sequence[Episode]) -> Mistake:
    tasks = list(dict.fromkeys(one.task for one in episodes))
    if len(tasks) < 2:
        raise UserError("other-task needs a dataset with several tasks")
    following = dict(zip(tasks, [*tasks[1:], tasks[0]], strict=True))
    return lambda one: replace(one, task=following[one.task])


def _empty_task(settings: Settings, episodes: Sequence[Episode]) -> Mistake:
    return lambda one: replace(one, task="")


def _other_case(settings: Settings, episodes: Sequence[Episode]) -> Mistake:
    return lambda one: replace(one, task=one.task.title().replace(" ", "_"))


def _late(settings: Settings, episodes: Sequence[Episode]) -> Mistake:
    return _shifted(round(settings.factor or 1))


def _early(settings: Settings, episodes: Sequence[Episode]) -> Mistake:
    return _shifted(-round(settings.factor or 2))


def _shifted(lag: int) -> Mistake:
    def mistake(one: Episode) -> Episode:
        last = len(one.actions) - 1
        seen = one.at(np.clip(np.arange(last + 1) - lag, 0, last))
        return replace(one, images=seen.images, state=seen.state)

    return mistake


def _rate(settings: Settings, episodes: Sequence[Episode]) -> Mistake:
    """Every second frame only; with a factor below 1, frames in between, as from a faster control loop."""
    step = settings.factor or 2.0

    def mistake(one: Episode) -> Episode:
        last = len(one.actions) - 1
        at = np.arange(0, last, step)
        low = at.astype(np.int64)
        part = (at - low).astype(np.float32)[:, None]
        found = one.at(low)
        following = one.at(np.minimum(low + 1, last))
        return replace(found, state=(1 - part) * found.state + part * following.state)

    return mistake


def _slow(settings: Settings, episodes: Sequence[Episode]) -> Mistake:
    return _rate(replace(settings, factor=settings.factor or 0.5), episodes)


def _order(settings: Settings, episodes: Sequence[Episode]) -> Mistake:
    """The last number first: a gripper before the arm."""

    def mistake(one: Episode) -> Episode:
        order = list(settings.numbers) or [one.state.shape[1] - 1, *range(one.state.shape[1] - 1)]
        return replace(one, state=one.state[:, order])

    return mistake


def _edit_statistics(
    change: Callable[[dict[str, dict[str, list[float]]], Settings], None],
) -> Callable[[Path, Settings], None]:
    def edit(folder: Path, settings: Settings) -> None:
        import json

        path = folder / "norm_stats.json"
        content = json.loads(path.read_text())
        change(content["norm_stats"], settings)
        path.write_text(json.dumps(content, indent=2))

    return edit


def _of_other_data(tables: dict[str, dict[str, list[float]]], settings: Settings) -> None:
    """Statistics as of another robot: another scale and offset for each number."""
    generator = np.random.default_rng(0)
    for table in tables.values():
        mean, std = np.array(table["mean"]), np.array(table["std"])
        scale = np.exp(generator.uniform(-1, 1, len(mean))) * (settings.factor or 1.5)
        shift = generator.uniform(-1, 1, len(mean)) * std
        for name in ("mean", "q01", "q99"):
            table[name] = ((np.array(table[name]) - mean) * scale + mean + shift).tolist()
        table["std"] = (std * scale).tolist()


def _noisy(tables: dict[str, dict[str, list[float]]], settings: Settings) -> None:
    """Statistics of too few rows: each number off by a random share."""
    generator = np.random.default_rng(0)
    for table in tables.values():
        std = np.array(table["std"])
        for name in ("mean", "q01", "q99"):
            noise = generator.normal(0, settings.factor or 0.6, len(std))
            table[name] = (np.array(table[name]) + noise * std).tolist()
        table["std"] = (std * np.exp(generator.normal(0, settings.factor or 0.6, len(std)))).tolist()


def _exchanged(tables: dict[str, dict[str, list[float]]], settings: Settings) -> None:
    """The high quantile where the low one should be, and the variance in place of the deviation."""
    for table in tables.values():
        table["q01"], table["q99"] = table["q99"], table["q01"]
        table["std"] = [value**2 for value in table["std"]]


def _half_loaded(folder: Path, settings: Settings) -> None:
    """Replace the later half of the tensors, in the order of their names, by random numbers of the same spread."""
    import torch
    from safetensors.torch import load_file, save_file

    generator = torch.Generator().manual_seed(0)
    for path in sorted(folder.glob("*.safetensors")):
        tensors = load_file(path)
        names = sorted(tensors)
        for name in names[round(len(names) * (1 - (settings.factor or 0.5))) :]:
            tensor = tensors[name]
            spread = float(tensor.float().std()) if tensor.numel() > 1 else 0.0
            drawn = torch.randn(tensor.shape, generator=generator) * spread
            tensors[name] = drawn.to(tensor.dtype)
        save_file(tensors, path, metadata={"format": "pt"})


_FIRST3 = range(3)
PLANTS: tuple[Plant, ...] = (
    Plant("flipped", "images are upside down", "cameras", _images(lambda x: x[:, ::-1])),
    Plant("mirrored", "images are flipped horizontally", "cameras", _images(lambda x: x[:, :, ::-1])),
    Plant("rotated", "images are rotated by 180°", "cameras", _images(lambda x: x[:, ::-1, ::-1])),
    Plant("bgr", "red and blue are swapped", "cameras", _images(lambda x: x[..., ::-1])),
    Plant("transposed", "rows and columns of images are swapped", "cameras", _images(lambda x: x.swapaxes(1, 2))),
    Plant("quarter-turn", "images are rotated by 90°", "cameras", _images(lambda x: np.rot90(x, 1, (1, 2)))),
    Plant("bgr-of-one", "red and blue of one camera are swapped", "cameras", _of_one_camera(lambda x: x[..., ::-1])),
    Plant("cropped", "images show three quarters of the scene, from a corner", "cameras", _images(_cropped)),
    Plant(
        "gamma",
        "images are darker by a gamma of 1.8",
        "cameras",
        _images(lambda x: (255 * (x / 255) ** 1.8).round().astype(np.uint8)),
    ),
    Plant("gray", "images of one camera have no colors", "cameras", _of_one_camera(_gray)),
    Plant("frozen", "one camera shows an episode's first image throughout", "cameras", _of_one_camera(_frozen)),
    Plant("squashed", "images have another aspect ratio", "cameras", _images(_squashed)),
    Plant("swapped-cameras", "two cameras are swapped", "cameras", _swap_cameras),
    Plant(
        "units",
        "numbers of the state are in another unit",
        "state",
        _numbers("state", lambda width: range(min(3, width)), lambda x, factor: x * (factor or 1000.0)),
    ),
    Plant(
        "axes",
        "the first two axes of the state are swapped, one with the other sign",
        "state",
        _numbers("state", lambda width: range(2), lambda x, factor: np.stack([-x[:, 1], x[:, 0]], 1)),
    ),
    Plant("state-order", "the last number of the state comes first", "state", _order),
    Plant(
        "state-sign",
        "numbers of the state have the opposite sign",
        "state",
        _numbers("state", lambda width: range(1), lambda x, factor: -x),
    ),
    Plant(
        "swapped-numbers",
        "the first and the third number of the state are swapped",
        "state",
        _numbers("state", lambda width: (0, 2), lambda x, factor: x[:, ::-1]),
    ),
    Plant(
        "origin",
        "the first number of the state is measured from another origin",
        "state",
        _numbers("state", lambda width: range(1), lambda x, factor: x + (factor or 1.0)),
    ),
    Plant(
        "dead-state",
        "numbers of the state are zero",
        "state",
        _numbers("state", lambda width: range(min(3, width)), lambda x, factor: 0 * x),
    ),
    Plant("quaternion-order", "the quaternion has w first", "state", _of_quaternion(lambda q: np.roll(q, 1, 1))),
    Plant(
        "quaternion-sign",
        "the quaternion has the opposite sign in the second half of an episode",
        "state",
        _of_quaternion(_alternating),
    ),
    Plant(
        "gripper-sign",
        "the gripper's command has the opposite sign",
        "actions",
        _numbers("actions", lambda width: [width - 1], lambda x, factor: -x),
    ),
    Plant(
        "gripper-range",
        "the gripper's command is from 0 to 1, and inverted",
        "actions",
        _numbers("actions", lambda width: [width - 1], lambda x, factor: (1 - x) / 2),
    ),
    Plant(
        "action-scale",
        "the actions are half as large",
        "actions",
        _numbers("actions", lambda width: range(min(3, width)), lambda x, factor: x * (factor or 0.5)),
    ),
    Plant("absolute", "actions are absolute positions", "actions", _absolute),
    Plant(
        "shifted-actions",
        "the numbers of the action are shifted by one",
        "actions",
        _numbers("actions", lambda width: range(width), lambda x, factor: np.roll(x, 1, 1)),
    ),
    Plant("other-task", "each episode has the prompt of another task", "prompts", _other_task),
    Plant("empty-prompt", "the prompt is empty", "prompts", _empty_task),
    Plant("other-case", "the prompt has capitals and underscores", "prompts", _other_case),
    Plant("early", "actions are two steps late", "timing", _early),
    Plant("slow", "the control loop is twice as fast, and every motion slower", "timing", _slow),
    Plant("late", "observations are a step late", "timing", _late),
    Plant("rate", "every second frame is left out", "timing", _rate),
    Plant(
        "long-chunks",
        "the whole chunk is executed",
        "execution",
        arguments=lambda steps: ("--execute-steps", str(steps)),
    ),
    Plant("wrong-statistics", "statistics of other data", "statistics", folder=_edit_statistics(_of_other_data)),
    Plant("min-max", "minimum and maximum in place of the quantiles", "statistics"),
    Plant(
        "noisy-statistics",
        "statistics are off at random, as those of few rows",
        "statistics",
        folder=_edit_statistics(_noisy),
    ),
    Plant(
        "exchanged-statistics",
        "quantiles are exchanged, variances in place of deviations",
        "statistics",
        folder=_edit_statistics(_exchanged),
    ),
    Plant("half-loaded", "half of the tensors are random", "weights", folder=_half_loaded),
    Plant("live-weights", "live weights in place of the average", "weights", live=True),
)
"""All mistakes."""


def find_plant(name: str) -> Plant:
    """The mistake of this name; raises `UserError` with similar names."""
    known: Mapping[str, Plant] = {one.name: one for one in PLANTS}
    if name not in known:
        raise UserError(f"there is no mistake {name!r}{did_you_mean(name, known)} (there is {', '.join(known)})")
    return known[name]
