"""The error for weights that do not fit a model: every difference, and guesses at what the weights are instead."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rlinf_core import UserError
from rlinf_plugins_openpi.model.dimensions import VARIANTS
from rlinf_plugins_openpi.weights.hints import hint_for_tensors

if TYPE_CHECKING:
    from rlinf_plugins_openpi.model.dimensions import Pi0Dimensions
    from rlinf_plugins_openpi.weights.layouts import FoundLayout

LINES = 12
"""Lines of a message at most; the differences that do not fit are counted."""
RL_PARTS = ("value_head.", "noise_head.", "q_head.", "actor_image_encoder.", "critic_image_encoder.", "dsrl_")
"""Modules that RLinf's reinforcement learning adds to a policy."""

Shape = tuple[int, ...]


def _by_depth[V](tensors: Mapping[str, V]) -> dict[str, V]:
    """Tensors with short paths first."""
    return dict(sorted(tensors.items(), key=lambda item: item[0].count(".") + item[0].count("/")))


@dataclass(frozen=True)
class Mismatch:
    """All differences between files and a model; falsy if there are none."""

    path: Path
    layout: FoundLayout
    dimensions: Pi0Dimensions
    """The sizes of the model."""
    there: Mapping[str, Shape]
    """Every tensor in the files."""
    missing: Mapping[str, Shape] = field(default_factory=dict)
    """Expected keys -> their expected shapes."""
    unexpected: Mapping[str, Shape] = field(default_factory=dict)
    misshapen: Mapping[str, tuple[Shape, Shape]] = field(default_factory=dict)
    """Keys -> (stored shape, expected shape)."""
    not_floats: Mapping[str, str] = field(default_factory=dict)
    """Keys -> their dtypes, which are not floating-point."""
    ambiguous: tuple[str, str] | None = None
    """Two keys of one parameter with different values."""

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.misshapen or self.not_floats or self.ambiguous)

    def error(self) -> UserError:
        """The error that counts all differences, guesses at their cause, and lists the first of every kind."""
        counts = f"{len(self.missing)} missing, {len(self.unexpected)} unexpected, {len(self.misshapen)} misshapen"
        looks = [*self._looks_like()]
        lines = [
            f"{self.path} does not fit the model: {counts} (it holds {len(self.there)} tensors in {self.layout})",
            *looks,
            "check policy.type, policy.variant and policy.weights:",
        ]
        kinds = [list(kind) for kind in self._differences() if kind]
        room, total = LINES - len(lines), sum(map(len, kinds))
        shown = room if total <= room else room - 1
        share = [0] * len(kinds)
        for _ in range(shown):  # In turn, so that a long kind leaves room for the others.
            open_kinds = [number for number, kind in enumerate(kinds) if share[number] < len(kind)]
            if open_kinds:
                share[min(open_kinds, key=lambda number: share[number])] += 1
        lines += [f"  {text}" for kind, count in zip(kinds, share, strict=True) for text in kind[:count]]
        if total > sum(share):
            lines.append(f"  and {total - sum(share)} more")
        return UserError("\n".join(lines))

    def _differences(self) -> Iterator[list[str]]:
        """Each kind of difference, one line per tensor; first those outside of layers, which distinguish models."""
        yield [f"missing: {key} {list(shape)}" for key, shape in _by_depth(self.missing).items()]
        yield [
            f"wrong shape: {key} is {list(has)}, the model has {list(wanted)}"
            for key, (has, wanted) in _by_depth(self.misshapen).items()
        ]
        yield [
            f"wrong dtype: {key} is {dtype}, weights are floating-point numbers"
            for key, dtype in self.not_floats.items()
        ]
        yield [f"unexpected: {key} {list(has)}" for key, has in _by_depth(self.unexpected).items()]
        if self.ambiguous:
            yield [f"ambiguous: {self.ambiguous[0]} and {self.ambiguous[1]} are one parameter but differ"]

    def _looks_like(self) -> Iterator[str]:
        """Guesses at the cause, each with a way to fix it."""
        if hint := hint_for_tensors(self.there, self.not_floats):
            yield hint
            return
        other = replace(self.dimensions, pi05=not self.dimensions.pi05)
        if self.missing and self._stored("time_mlp_in.bias" if other.pi05 else "state_proj.bias", other):
            name, kind = ("π0.5", "pi05") if other.pi05 else ("π0", "pi0")
            yield f'this looks like {name}: set policy.type = "{kind}"'
        elif self.missing and not self._stored("action_out_proj.bias", self.dimensions):
            yield "this looks like another model: it has no action_out_proj (π0-FAST has none)"
        elif self.missing and not self.unexpected and not self.misshapen:
            yield "this looks like only a part of the weights: is a file missing?"
        yield from self._other_sizes()
        if any("lora" in key.lower() for key in self.unexpected):
            yield (
                "this looks like weights with unmerged LoRA adapters: merge them with the software that trained them, "
                "or openpi's JAX parameters with `rlinf convert`"
            )
        elif parts := sorted({part for part in RL_PARTS for key in self.unexpected if part in key}):
            yield f"this looks like a reinforcement-learning checkpoint ({', '.join(parts)}…): save the policy alone"

    def _other_sizes(self) -> Iterator[str]:
        if not self.misshapen:
            return
        embedding = self._stored("embedding.weight", self.dimensions)
        for name, sizes in VARIANTS.items():
            if embedding == (sizes.vocab_size, sizes.vlm.width) and sizes.vlm != self.dimensions.vlm:
                yield f'this looks like another size: set policy.variant = "{name}"'
                return
        bias = self._stored("action_out_proj.bias", self.dimensions)
        if bias and bias != (self.dimensions.action_dim,):
            yield f"this looks like another action width: set policy.action_dim = {bias[0]}"

    def _stored(self, name: str, dimensions: Pi0Dimensions) -> Shape | None:
        """The stored shape of a tensor that has a key of its own; None if it is missing."""
        return self.there.get(self.layout.slots(dimensions)[name].key)
