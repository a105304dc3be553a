"""How many bytes a training step takes on each rank, by arithmetic: what is sharded, gathered, accumulated and saved.

Imports no torch. `rlinf plan` asks before a run, the message of a run that is out of memory after it. Parameters,
gradients and optimizer state are float32, 4 bytes a number; a unit's parameters are gathered together, in their compute
dtype. GB are 10⁹ bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

MASTER = 4
"""Bytes of a number in float32."""
RESERVED, GAPS = 1.0e9, 0.04
"""What a device's memory holds besides tensors: driver and libraries; and the share lost between tensors."""


@dataclass(frozen=True)
class Parameter:
    """A parameter, whole."""

    name: str
    shape: tuple[int, ...]
    trainable: bool = True
    """Has optimizer state."""
    reached: bool = True
    """The loss gives it a gradient, if it is trainable."""
    averaged: bool = True
    """Is in the moving average, if there is one."""

    @property
    def numel(self) -> int:
        """Its numbers."""
        return math.prod(self.shape)

    @property
    def has_gradient(self) -> bool:
        """Whether a step makes a gradient for it."""
        return self.trainable and self.reached

    def shard(self, ranks: int) -> int:
        """The numbers that the first rank holds: rows are dealt out whole."""
        if not self.shape:
            return 1
        return -(-self.shape[0] // ranks) * math.prod(self.shape[1:])


@dataclass(frozen=True)
class Unit:
    """Parameters that are gathered and released together."""

    parameters: tuple[Parameter, ...]
    itemsize: int
    """Bytes of a number while they are gathered: 2 in bfloat16, 0 if they never are."""

    @property
    def gathered(self) -> int:
        """Bytes while they are gathered."""
        return self.itemsize * sum(parameter.numel for parameter in self.parameters)

    @property
    def learning(self) -> int:
        """Numbers that get a gradient."""
        return sum(parameter.numel for parameter in self.parameters if parameter.has_gradient)


@dataclass(frozen=True)
class Sharding:
    """How a run spreads parameters, and what it keeps between micro batches; the settings of `[trainer]`."""

    ranks: int = 1
    num_replicas: int = 1
    reshard_after_forward: bool = True
    reduce_every_micro_batch: bool = False
    cpu_offload: bool = False
    ema: bool = False
    ema_on_cpu: bool = False

    @property
    def shards(self) -> int:
        """Ranks that share one copy of the model."""
        return self.ranks // self.num_replicas


@dataclass(frozen=True)
class States:
    """Bytes a rank keeps from step to step."""

    weights: int
    gradients: int
    """From the end of the backward pass to the optimizer step."""
    optimizer: int
    ema: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.gradients + self.optimizer + self.ema


def states(units: Sequence[Unit], sharding: Sharding) -> States:
    """What a rank keeps: the first, whose shards are the largest."""
    whole = [parameter for unit in units for parameter in unit.parameters]
    trained = [parameter for parameter in whole if parameter.trainable]
    held = MASTER * sum(parameter.shard(sharding.shards) for parameter in trained)
    return States(
        weights=MASTER * sum(parameter.shard(sharding.shards) for parameter in whole),
        gradients=MASTER * sum(p.shard(sharding.shards) for p in trained if p.reached),
        optimizer=2 * held + MASTER * len(trained),  # Two moments, and a count of steps each.
        ema=MASTER * sum(p.shard(sharding.shards) for p in whole if p.averaged) if sharding.ema else 0,
    )


@dataclass(frozen=True)
class Activations:
    """Bytes of activations over a backward pass; they grow evenly with the samples of a micro batch."""

    units: tuple[int, ...]
    """Numbers of the units in the order in which their last parameter gets its gradient."""
    once: tuple[float, ...]
    """At each of them the most bytes alive, of which this many do not depend on the batch,"""
    a_sample: tuple[float, ...]
    """and this many are a sample's."""

    def at(self, micro_batch: int) -> list[float]:
        """The most bytes alive while each unit gets its gradients."""
        return [once + micro_batch * each for once, each in zip(self.once, self.a_sample, strict=True)]


Moments = Sequence[tuple[str, int]]
"""In the order in which parameters get their gradients: a name, and the most bytes alive since the one before."""


def activations_of(units: Sequence[Unit], smaller: tuple[int, Moments], larger: tuple[int, Moments]) -> Activations:
    """What grows with a micro batch and what does not, from two micro batches that were counted.

    Args:
        units: In the order of use.
        smaller: Its samples, and the bytes alive over its backward pass.
        larger: The same of more samples.
    """
    home = {parameter.name: index for index, unit in enumerate(units) for parameter in unit.parameters}
    samples = larger[0] - smaller[0]
    low, high = (_by_unit(home, moments) for _, moments in (smaller, larger))
    order = [index for index in high if index in low]
    slopes = [(high[index] - low[index]) / samples for index in order]
    once = [low[index] - smaller[0] * slope for index, slope in zip(order, slopes, strict=True)]
    return Activations(tuple(order), tuple(once), tuple(slopes))


def _by_unit(home: dict[str, int], moments: Moments) -> dict[int, int]:
    """The most bytes alive while each unit gets its gradients, in the order in which units are done."""
    last = {home[name]: place for place, (name, _) in enumerate(moments)}
    peaks: dict[int, int] = {}
    start = 0
    for index, place in sorted(last.items(), key=lambda item: item[1]):
        peaks[index] = max(peak for _, peak in moments[start : place + 1])
        start = place + 1
    return peaks


@dataclass(frozen=True)
class Memory:
    """Bytes on a rank at the moment of a step that takes most."""

    weights: float = 0
    optimizer: float = 0
    ema: float = 0
    gradients: float = 0
    """Those kept, and those of the unit that is being computed."""
    gathered: float = 0
    """Parameters in the compute dtype."""
    reducing: float = 0
    """Gradients on their way to their shards."""
    activations: float = 0
    on_host: float = 0
    """In the machine's memory instead of the device's; not in `total`."""

    @property
    def total(self) -> float:
        """All on the device."""
        device = (self.weights, self.optimizer, self.ema, self.gradients, self.gathered, self.reducing)
        return sum(device) + self.activations


def step_memory(
    units: Sequence[Unit], activations: Activations, micro_batch: int, sharding: Sharding, *, accumulates: bool
) -> Memory:
    """The moment of a training step at which a rank needs most.

    FSDP2's course of events: a unit's parameters are gathered while the next one's are fetched already; its gradient
    is there whole, is copied to float32, reduced, and leaves a shard.

    Args:
        units: In the order of use, the root last.
        activations: What `rlinf_core.plan` counted.
        micro_batch: Samples a rank computes at a time.
        sharding: How parameters are spread.
        accumulates: Whether a step has more than one micro batch.
    """
    kept = states(units, sharding)
    base = Memory(weights=kept.weights, optimizer=kept.optimizer, ema=kept.ema)
    if sharding.ema_on_cpu or sharding.cpu_offload:
        base = replace(base, ema=0, on_host=kept.ema)
    if sharding.cpu_offload:
        base = replace(base, weights=0, optimizer=0, on_host=kept.total)
    finished = float(kept.gradients if accumulates and not sharding.cpu_offload else 0)
    grows = not accumulates and not sharding.cpu_offload
    if accumulates and not sharding.reduce_every_micro_batch:
        finished = float(MASTER * sum(unit.learning for unit in units))
    moments = [replace(base, gradients=0.0 if sharding.cpu_offload else float(kept.gradients))]  # The optimizer's.
    before = 0
    for index, bytes_alive in zip(activations.units, activations.at(micro_batch), strict=True):
        unit = units[index]
        whole = MASTER * unit.learning
        gradient = unit.itemsize * unit.learning
        shard = MASTER * sum(p.shard(sharding.shards) for p in unit.parameters if p.has_gradient)
        computing = replace(
            base,
            gradients=finished + gradient,
            gathered=_gathered(units, index, sharding),
            reducing=before,
            activations=bytes_alive,
        )
        # A gradient that was accumulated in float32 has taken this one in by then.
        added = shard if accumulates and not sharding.reduce_every_micro_batch else gradient + shard
        reducing = replace(computing, gradients=finished + added, reducing=whole)
        moments += [computing, replace(reducing, gathered=_gathered(units, index, sharding, released=True))]
        finished += shard if grows else 0
        before = whole
    return max(moments, key=lambda memory: memory.total)


def _gathered(units: Sequence[Unit], index: int, sharding: Sharding, *, released: bool = False) -> int:
    """Parameters that are whole while a unit computes backward, or after it was `released`."""
    if not sharding.reshard_after_forward:
        return sum(unit.gathered for unit in units)
    root = units[-1].gathered
    if index == len(units) - 1:
        return root
    following = units[index - 1].gathered if index else 0
    # What arrives from other ranks lies in one piece first, and is copied out of it.
    copies = 2 if sharding.shards > 1 else 1
    return root + (0 if released else units[index].gathered) + copies * following


def largest_micro_batch(
    units: Sequence[Unit], activations: Activations, sharding: Sharding, share: int, capacity: float
) -> int:
    """The largest micro batch that fits, of those that divide a rank's share of the global batch; 0: none does.

    Args:
        units: See `step_memory`.
        activations: See `step_memory`.
        sharding: See `step_memory`.
        share: Samples of a rank in a step.
        capacity: Bytes for tensors, `usable`.
    """
    for size in sorted((n for n in range(1, share + 1) if share % n == 0), reverse=True):
        if step_memory(units, activations, size, sharding, accumulates=size < share).total <= capacity:
            return size
    return 0


def usable(card: float) -> float:
    """Bytes that tensors can have of a card's nominal memory in GB (which is counted in 2³⁰ bytes)."""
    return (card * 2**30 - RESERVED) / (1 + GAPS)


@dataclass(frozen=True)
class Traffic:
    """Bytes a rank receives in a step."""

    all_gather: float
    reduce_scatter: float
    all_reduce: float
    """Between replicas."""

    @property
    def total(self) -> float:
        """All of it."""
        return self.all_gather + self.reduce_scatter + self.all_reduce


def traffic(units: Sequence[Unit], sharding: Sharding, micro_batches: int) -> Traffic:
    """What is communicated in a step of some micro batches a rank.

    A ring sends each rank the other ranks' part of a unit, (n - 1) / n of it. The root stays gathered from its forward
    pass to its backward pass's end, but for its own release in between.
    """
    others = (sharding.shards - 1) / sharding.shards
    gathers = 2 * micro_batches if sharding.reshard_after_forward else 1
    reduces = micro_batches if sharding.reduce_every_micro_batch else 1
    learning = MASTER * sum(unit.learning for unit in units)
    replicas = sharding.num_replicas
    return Traffic(
        all_gather=gathers * others * sum(unit.gathered for unit in units),
        reduce_scatter=reduces * others * learning,
        all_reduce=2 * (replicas - 1) / replicas * learning / sharding.shards,
    )
