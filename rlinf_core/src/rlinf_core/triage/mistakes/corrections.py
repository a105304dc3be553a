"""A correction undoes one known mistake: in the observations or actions of the site, or in what a policy gets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from rlinf_core.triage.mistakes.rows import Rows, Vectors


class ImageChange(Protocol):
    """Changes images [..., height, width, 3]; it works for small and for full-size ones."""

    def __call__(self, images: NDArray[Any], /) -> NDArray[Any]:
        """The changed images, in the same dtype."""
        ...


StateChange = Callable[[Vectors], Vectors]
"""Changes states [..., D]."""
ActionChange = Callable[[Vectors, Vectors | None], Vectors]
"""Changes action chunks [..., H, D]; the second argument are the states [..., D], corrected already."""


@dataclass(frozen=True, eq=False)
class Correction:
    """What would undo a mistake. The default changes nothing."""

    mistake: str = ""
    """The mistake, as a clause: `images of camera 'wrist' are rotated by 180°`."""
    doing: str = ""
    """The correction, as a noun phrase for a report: `rotating camera 'wrist' by 180°`."""
    way_out: str = ""
    """What to do about it, where it cannot be said from `doing`."""
    images: Mapping[str, tuple[str, ImageChange]] = field(default_factory=dict)
    """Camera -> the camera whose images to use instead, and how to change them."""
    state: StateChange | None = None
    actions: ActionChange | None = None
    prompts: Mapping[str, str] = field(default_factory=dict)
    """Prompt -> the one to use instead."""
    image_lag: int = 0
    """Images of so many rows later belong to a row."""
    state_lag: int = 0
    """The state of so many rows later belongs to a row."""
    complexity: float = 1.0
    """How much evidence it needs compared with a simple mistake: 1 is a flip or a sign."""

    @property
    def parts(self) -> tuple[str, ...]:
        """What of a row it changes: cameras, `state`, `actions`, and `lag`."""
        found = [f"image {camera}" for camera in self.images]
        found += ["state"] * (self.state is not None) + ["actions"] * (self.actions is not None)
        return (*found, *["lag"] * bool(self.image_lag or self.state_lag))

    def apply(self, rows: Rows) -> Rows:
        """Corrected rows; those whose later row is not in the same run are left out."""
        rows = self._aligned(rows)
        images = dict(rows.images)
        for camera, (other, change) in self.images.items():
            if other in rows.images:
                images[camera] = change(rows.images[other])
        state, after, actions = rows.state, rows.after, rows.actions
        if self.state is not None and state is not None and after is not None:
            state, after = self.state(state), self.state(after)
        if self.actions is not None:
            actions = self.actions(actions, state)
        prompts = tuple(self.prompts.get(prompt, prompt) for prompt in rows.prompts)
        return replace(rows, images=images, state=state, after=after, actions=actions, prompts=prompts)

    def _aligned(self, rows: Rows) -> Rows:
        if not (self.image_lag or self.state_lag):
            return rows
        places = np.arange(len(rows))
        lags = {self.image_lag, self.state_lag}
        kept = np.ones(len(rows), np.bool_)
        for lag in lags:
            later = np.clip(places + lag, 0, len(rows) - 1)
            kept &= (later == places + lag) & (rows.runs[later] == rows.runs) & (rows.episodes[later] == rows.episodes)
        here = rows.take(places[kept])
        seen, felt = rows.take(places[kept] + self.image_lag), rows.take(places[kept] + self.state_lag)
        return replace(here, images=seen.images, state=felt.state, after=felt.after)

    def fix(self, sample: dict[str, Any], seen: Mapping[str, Any], felt: Mapping[str, Any]) -> dict[str, Any]:
        """A corrected repacked sample, with images at full size.

        Args:
            sample: The repacked row.
            seen: The repacked row whose images belong to it.
            felt: The repacked row whose state belongs to it.
        """
        out = dict(sample)
        there = seen.get("images", {})
        out["images"] = {
            camera: np.ascontiguousarray(self.images[camera][1](there[self.images[camera][0]]))
            if camera in self.images
            else image
            for camera, image in there.items()
        }
        if "state" in felt:
            out["state"] = felt["state"] if self.state is None else self.state(felt["state"].astype(np.float64))
        if self.actions is not None and "actions" in sample:
            out["actions"] = self.actions(sample["actions"].astype(np.float64), out.get("state"))
        if "prompt" in sample:
            out["prompt"] = self.prompts.get(sample["prompt"], sample["prompt"])
        return out

    def then(self, other: Correction) -> Correction:
        """Both corrections, this one first."""
        images = dict(self.images)
        for camera, (source, change) in other.images.items():
            first = self.images.get(source)
            images[camera] = (first[0], _after(first[1], change)) if first else (source, change)
        state, actions = self.state, self.actions
        if other.state is not None:
            before, later = self.state, other.state
            state = later if before is None else lambda x: later(before(x))
        if other.actions is not None:
            sooner, latter = self.actions, other.actions
            actions = latter if sooner is None else lambda a, s: latter(sooner(a, s), s)
        return Correction(
            mistake=" and ".join(text for text in (self.mistake, other.mistake) if text),
            doing=" and ".join(text for text in (self.doing, other.doing) if text),
            way_out=other.way_out or self.way_out,
            images=images,
            state=state,
            actions=actions,
            prompts={**other.prompts, **{key: other.prompts.get(value, value) for key, value in self.prompts.items()}},
            image_lag=self.image_lag + other.image_lag,
            state_lag=self.state_lag + other.state_lag,
            complexity=self.complexity + other.complexity,
        )


NOTHING = Correction()
"""Changes nothing."""


def _after(first: ImageChange, then: ImageChange) -> ImageChange:
    return lambda images: then(first(images))
