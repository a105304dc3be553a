"""How many bytes a training step takes on each rank, by arithmetic: what is sharded, gathered, accumulated and saved.

Imports no torch. Used by `rlinf plan` and by the message of a run that is out of memory. Trained parameters and
gradients are float32, 4 bytes per number, frozen ones may be held in less; what the optimizer keeps, it says itself; a
unit's parameters are gathered together, in their compute dtype. GB are 10⁹ bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

MASTER = 4
"""Bytes of a number in float32."""
RESERVED, GAPS = 1.0e9, 0.04
"""Bytes of a device's memory that driver and libraries take, and the fraction lost in gaps between tensors."""
NCCL = 1.0e9
"""Bytes of the buffers of an NCCL communicator. Users report 0.5 to 1.6 GB, which depends on GPUs, links and algorithms
(NVIDIA/nccl issues 864, 964 and 1685)."""


@dataclass(frozen=True)
class State:
    """What an optimizer keeps of one parameter, in bytes; without arguments, nothing."""

    per_number: int = 0
    """For each element of the parameter, sharded as it is."""
    once: int = 0
    """On every rank."""


@dataclass(frozen=True)
class Parameter:
    """A whole, unsharded parameter."""

    name: str
    shape: tuple[int, ...]
    trainable: bool = True
    """Whether it has optimizer state."""
    reached: bool = True
    """Whether the loss gives it a gradient, if it is trainable."""
    averaged: bool = True
    """Whether it is in the moving average, if there is one."""
    state: State = State()
    """What the optimizer keeps of it."""
    itemsize: int = MASTER
    """Bytes per number as it is held."""

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def has_gradient(self) -> bool:
        """Whether a step computes a gradient for it."""
        return self.trainable and self.reached

    def shard(self, ranks: int) -> int:
        """Number of elements on the first rank: sharding splits between rows."""
        if not self.shape:
            return 1
        return -(-self.shape[0] // ranks) * math.prod(self.shape[1:])

    def padded(self, ranks: int) -> int:
        """Number of elements that ranks exchange: all shards are as large as the first."""
        return ranks * self.shard(ranks) if ranks > 1 else self.numel


@dataclass(frozen=True)
class Unit:
    """Parameters that are gathered and released together."""

    parameters: tuple[Parameter, ...]
    itemsize: int
    """Bytes per number while gathered: 2 in bfloat16, 0 if they are never gathered."""
    read_in_backward: bool = True
    """Whether they are gathered again for the backward pass."""

    @property
    def gathered(self) -> int:
        """Bytes while they are gathered."""
        return self.itemsize * sum(parameter.numel for parameter in self.parameters)

    @property
    def learning(self) -> int:
        """Number of elements that get a gradient."""
        return sum(parameter.numel for parameter in self.parameters if parameter.has_gradient)

    def exchanged(self, ranks: int) -> int:
        """Bytes of the buffer in which so many ranks gather the parameters."""
        return self.itemsize * sum(parameter.padded(ranks) for parameter in self.parameters)

    def reduced(self, ranks: int) -> int:
        """Bytes of the float32 buffer in which the gradients are reduced to their shards."""
        return MASTER * sum(parameter.padded(ranks) for parameter in self.parameters if parameter.has_gradient)


@dataclass(frozen=True)
class Sharding:
    """How a run shards parameters, and what it keeps between micro batches; the settings of `[trainer]`."""

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

    @property
    def communicators(self) -> int:
        """NCCL communicators of a rank: of all ranks and, with replicas, of a copy's shards and of a shard's copies."""
        if self.ranks == 1:
            return 0
        return 1 if self.num_replicas == 1 else 2 + (self.shards > 1)


@dataclass(frozen=True)
class States:
    """Bytes that a rank keeps from step to step."""

    weights: int
    gradients: int
    """From the end of the backward pass to the optimizer step."""
    optimizer: int
    ema: int

    @property
    def total(self) -> int:
        """The sum of all."""
        return self.weights + self.gradients + self.optimizer + self.ema


def states(units: Sequence[Unit], sharding: Sharding) -> States:
    """What the first rank keeps, whose shards are the largest."""
    whole = [parameter for unit in units for parameter in unit.parameters]
    trained = [parameter for parameter in whole if parameter.trainable]
    return States(
        weights=sum(parameter.itemsize * parameter.shard(sharding.shards) for parameter in whole),
        gradients=MASTER * sum(p.shard(sharding.shards) for p in trained if p.reached),
        optimizer=sum(p.state.per_number * p.shard(sharding.shards) + p.state.once for p in trained),
        ema=MASTER * sum(p.shard(sharding.shards) for p in whole if p.averaged) if sharding.ema else 0,
    )


@dataclass(frozen=True)
class Activations:
    """Bytes of activations during a backward pass; linear in the samples of a micro batch."""

    units: tuple[int, ...]
    """Indices of the units in the order in which their last parameter gets its gradient."""
    once: tuple[float, ...]
    """For each unit, the part of the most bytes alive that does not depend on the batch."""
    a_sample: tuple[float, ...]
    """For each unit, the part of the most bytes alive per sample."""

    def at(self, micro_batch: int) -> list[float]:
        """The most bytes alive while each unit gets its gradients."""
        return [once + micro_batch * each for once, each in zip(self.once, self.a_sample, strict=True)]


Moments = Sequence[tuple[str, int]]
"""In the order in which parameters get their gradients: name, most bytes alive since the previous one."""


def activations_of(units: Sequence[Unit], smaller: tuple[int, Moments], larger: tuple[int, Moments]) -> Activations:
    """Split activations into a constant and a per-sample part, from two counted micro batches.

    Args:
        units: In order of use.
        smaller: Number of samples, and the bytes alive during the backward pass.
        larger: The same for more samples.
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
    last = {home[name]: moment for moment, (name, _) in enumerate(moments)}
    peaks: dict[int, int] = {}
    start = 0
    for index, moment in sorted(last.items(), key=lambda item: item[1]):
        peaks[index] = max(peak for _, peak in moments[start : moment + 1])
        start = moment + 1
    return peaks


@dataclass(frozen=True)
class Memory:
    """Bytes on a rank at the peak of a step."""

    weights: float = 0
    optimizer: float = 0
    ema: float = 0
    gradients: float = 0
    """Accumulated gradients, and those of the unit being computed."""
    gathered: float = 0
    """Parameters in the compute dtype."""
    reducing: float = 0
    """Gradients on their way to their shards."""
    activations: float = 0
    on_host: float = 0
    """In the machine's memory instead of the device's; not in `total`."""

    @property
    def total(self) -> float:
        """The sum of all on the device."""
        device = (self.weights, self.optimizer, self.ema, self.gradients, self.gathered, self.reducing)
        return sum(device) + self.activations


def step_memory(
    units: Sequence[Unit], activations: Activations, micro_batch: int, sharding: Sharding, *, accumulates: bool
) -> Memory:
    """Memory of a rank at the peak of a training step.

    Follows FSDP2: while a unit's parameters are gathered, the next unit's are prefetched; its gradient exists whole,
    is copied to float32, reduced, and becomes a shard.

    Args:
        units: In order of use, the root last.
        activations: Counted by `rlinf_core.plan`.
        micro_batch: Samples that a rank computes at a time.
        sharding: How parameters are sharded.
        accumulates: Whether a step has more than one micro batch.
    """
    kept = states(units, sharding)
    base = Memory(weights=kept.weights, optimizer=kept.optimizer, ema=kept.ema)
    if sharding.ema_on_cpu or sharding.cpu_offload:
        # The average, and page-locked memory where the weights land.
        base = replace(base, ema=0, on_host=kept.ema * (1 if sharding.cpu_offload else 2))
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
        whole = unit.reduced(sharding.shards)
        gradient = unit.itemsize * unit.learning
        shard = MASTER * sum(p.shard(sharding.shards) for p in unit.parameters if p.has_gradient)
        computing = replace(
            base,
            gradients=finished + gradient,
            gathered=_gathered(units, index, sharding),
            reducing=before,
            activations=bytes_alive,
        )
        # When gradients accumulate in float32, this one has been added by then.
        added = shard if accumulates and not sharding.reduce_every_micro_batch else gradient + shard
        reducing = replace(computing, gradients=finished + added, reducing=whole)
        moments += [computing, replace(reducing, gathered=_gathered(units, index, sharding, released=True))]
        finished += shard if grows else 0
        before = whole
    return max(moments, key=lambda memory: memory.total)


def _gathered(units: Sequence[Unit], index: int, sharding: Sharding, *, released: bool = False) -> int:
    """Bytes of gathered parameters during a unit's backward pass, or after it is `released`."""
    if not sharding.reshard_after_forward:
        return sum(unit.gathered for unit in units)
    root = units[-1].gathered
    if index == len(units) - 1:
        return root

    def again(unit: Unit) -> int:
        return unit.gathered if unit.read_in_backward else 0

    following = units[index - 1] if index else None
    # An all-gather first fills one buffer, from which the parameters are then copied.
    buffer = following.exchanged(sharding.shards) if following and sharding.shards > 1 else 0
    coming = again(following) + (buffer if following.read_in_backward else 0) if following else 0
    return root + (0 if released else again(units[index])) + coming


def largest_micro_batch(
    units: Sequence[Unit], activations: Activations, sharding: Sharding, share: int, capacity: float
) -> int:
    """The largest micro batch that fits and divides a rank's share of the global batch; 0: none fits.

    Args:
        units: See `step_memory`.
        activations: See `step_memory`.
        sharding: See `step_memory`.
        share: Samples per rank and step.
        capacity: Bytes available for tensors, see `usable`.
    """
    for size in sorted((n for n in range(1, share + 1) if share % n == 0), reverse=True):
        if step_memory(units, activations, size, sharding, accumulates=size < share).total <= capacity:
            return size
    return 0


def usable(gpu_memory: float, sharding: Sharding) -> float:
    """Bytes that tensors can use, given a GPU's nominal memory in GB (nominal GB are 2³⁰ bytes)."""
    return (gpu_memory * 2**30 - RESERVED - sharding.communicators * NCCL) / (1 + GAPS)


@dataclass(frozen=True)
class Traffic:
    """Bytes that a rank receives in a step."""

    all_gather: float
    reduce_scatter: float
    all_reduce: float
    """Between replicas."""

    @property
    def total(self) -> float:
        """The sum of all."""
        return self.all_gather + self.reduce_scatter + self.all_reduce


def traffic(units: Sequence[Unit], sharding: Sharding, micro_batches: int) -> Traffic:
    """Communication per rank in a step of `micro_batches` micro batches.

    A ring sends each rank the other ranks' shards of a unit, (n - 1) / n of it, where all shards are as large as the
    first. The root is gathered for its forward pass, released, and gathered again until the end of the backward pass.
    """
    others = (sharding.shards - 1) / sharding.shards

    def gathers(unit: Unit) -> int:
        if not sharding.reshard_after_forward:
            return 1
        return micro_batches * (1 + unit.read_in_backward)

    reduces = micro_batches if sharding.reduce_every_micro_batch else 1
    learning = sum(unit.reduced(sharding.shards) for unit in units)
    replicas = sharding.num_replicas
    return Traffic(
        all_gather=others * sum(gathers(unit) * unit.exchanged(sharding.shards) for unit in units),
        reduce_scatter=reduces * others * learning,
        all_reduce=2 * (replicas - 1) / replicas * learning / sharding.shards,
    )
