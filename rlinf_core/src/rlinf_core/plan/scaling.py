"""How a step's time grows with the number of GPUs: a model, of which docs/scaling.md names every assumption.

Nothing here is measured. Bytes are those of `costs.memory.traffic`, which `rlinf rehearse` counts on the run's own
collectives; latencies are those that NCCL assumes when it chooses an algorithm (`src/graph/tuning.cc`: rings with the
protocol Simple); bandwidths are data sheets' times `ACHIEVED`. Each GPU computes the same number of samples per
step, so the global batch grows with the GPUs. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from rlinf_core.costs.gpus import NVLINK, PCIE, PEAKS
from rlinf_core.costs.memory import Sharding, Unit, states, traffic
from rlinf_core.errors import UserError, did_you_mean

INTERCONNECTS: dict[str, float] = {
    "ndr-8x400": 400.0,
    "hdr-8x200": 200.0,
    "efa-p5": 400.0,
    "efa-p4d": 50.0,
    "400g": 50.0,
    "200g": 25.0,
    "100g": 12.5,
    "25g": 3.125,
    "10g": 1.25,
}
"""Networks between machines -> 10⁹ bytes per second of a machine in one direction, the line rate: eight InfiniBand
ports of 400 or 200 Gb/s, AWS's p5 and p4d, or one port of so many Gb/s."""
ACHIEVED = 0.8
"""Fraction of a line rate that large messages reach."""
BASE, NVLINK_HOP, PCIE_HOP, NETWORK_HOP = 8.4e-6, 3.4e-6, 5.7e-6, 14.0e-6
"""Seconds per collective, and per step of a ring over NVLink, PCIe and a network."""
TO_HOST = 20e9
"""Bytes per second of a GPU's copy to page-locked memory, for checkpoints."""
FORWARD = 1 / 3
"""Share of the forward pass in a step's operations; with activation checkpointing a bit less."""


@dataclass(frozen=True)
class Machines:
    """What a run would run on."""

    gpu: str
    """A key of `costs.gpus.PEAKS`."""
    gpus: int
    """GPUs of a machine."""
    network: float
    """10⁹ bytes per second of a machine, in one direction."""
    mfu: float
    """Useful operations of one GPU alone, as a fraction of its peak."""
    samples_per_second: float | None = None
    """That a machine can load and decode (`rlinf bench-data`); None: enough."""

    @property
    def link(self) -> float:
        """Bytes per second of a GPU inside a machine."""
        return 1e9 * ACHIEVED * NVLINK.get(self.gpu, PCIE)

    @property
    def hop(self) -> float:
        """Seconds per step of a ring inside a machine."""
        return NVLINK_HOP if self.gpu in NVLINK else PCIE_HOP

    def bandwidth(self, nodes: int) -> float:
        """Bytes per second of a GPU in a group on so many machines, all of whose GPUs communicate at once."""
        return self.link if nodes == 1 else min(self.link, 1e9 * ACHIEVED * self.network / self.gpus)

    def latency(self, ranks: int, nodes: int, rounds: int = 1) -> float:
        """Seconds that a ring of so many ranks takes for an empty message."""
        return BASE + rounds * ((ranks - nodes) * self.hop + (nodes - 1) * NETWORK_HOP)


def interconnect(text: str) -> float:
    """10⁹ bytes per second of a machine's network, given as a name or as a number.

    Raises:
        UserError: Neither.
    """
    if text in INTERCONNECTS:
        return INTERCONNECTS[text]
    try:
        if 0 < (number := float(text)) < math.inf:
            return number
    except ValueError:
        pass
    raise UserError(
        f"--interconnect: {text!r} is neither a number of GB/s above 0 nor one of {', '.join(INTERCONNECTS)}"
        f"{did_you_mean(text, INTERCONNECTS)}"
    )


@dataclass(frozen=True)
class Load:
    """What a step consists of, whatever the number of GPUs; from a plan."""

    units: tuple[Unit, ...]
    sharding: Sharding
    """As configured; `ranks` and `num_replicas` are replaced."""
    samples: int
    """Samples per GPU and step."""
    micro_batches: int
    flops: float
    """Useful operations of a sample."""
    save_interval: int
    """Steps between checkpoints; 0: only at the end."""


@dataclass(frozen=True)
class ScaledStep:
    """The predicted step on a number of GPUs; times in seconds."""

    gpus: int
    replicas: int
    """Copies of the model."""
    compute: float
    all_gather: float
    reduce_scatter: float
    all_reduce: float
    exposed: float
    """The part of communication that computation does not hide."""
    data: float
    """Waiting for batches."""
    checkpoint: float
    """Copying weights and optimizer to host memory, spread over the steps between checkpoints."""
    samples: int
    """Samples of the global batch."""

    @property
    def total(self) -> float:
        """The whole step."""
        return self.compute + self.exposed + self.data + self.checkpoint

    @property
    def samples_per_second(self) -> float:
        """Speed of all GPUs together."""
        return self.samples / self.total


def scale(load: Load, machines: Machines, most: int) -> list[ScaledStep]:
    """The step on 1, 2, 4, ... GPUs, up to `most`."""
    return [scaled_step(load, machines, gpus) for gpus in sorted({*_powers(most), most})]


def _powers(most: int) -> Iterator[int]:
    gpus = 1
    while gpus <= most:
        yield gpus
        gpus *= 2


def scaled_step(load: Load, machines: Machines, gpus: int) -> ScaledStep:
    """The step on so many GPUs.

    A run with several copies of the model keeps the number of GPUs per copy; on fewer GPUs it has one copy.
    """
    shards = min(gpus, load.sharding.shards) if load.sharding.num_replicas > 1 else gpus
    if gpus % shards:
        shards = math.gcd(gpus, shards)
    sharding = replace(load.sharding, ranks=gpus, num_replicas=gpus // shards)
    compute = load.samples * load.flops / (machines.mfu * PEAKS[machines.gpu] * 1e12)
    times = _communication(load, machines, sharding)
    network, first, last = times.network, times.first, times.last
    forward, backward = FORWARD * compute, (1 - FORWARD) * compute
    # All-gathers of the next unit run beside computation, forward and backward; gradients beside the backward pass.
    exposed = max(0.0, times.gather_forward - forward) + max(0.0, network - backward)
    exposed = max(exposed, first + last) if gpus > 1 else 0.0
    kept = states(load.units, sharding)
    saved = (kept.weights + kept.optimizer + kept.ema) / TO_HOST / load.save_interval if load.save_interval else 0.0
    return ScaledStep(
        gpus=gpus,
        replicas=sharding.num_replicas,
        compute=compute,
        all_gather=times.all_gather,
        reduce_scatter=times.reduce_scatter,
        all_reduce=times.all_reduce,
        exposed=exposed,
        data=_waiting(load, machines, gpus, compute + exposed),
        checkpoint=saved,
        samples=load.samples * gpus,
    )


@dataclass(frozen=True)
class _Times:
    """Seconds of communication in a step."""

    all_gather: float
    gather_forward: float
    """The part of `all_gather` in forward passes."""
    reduce_scatter: float
    all_reduce: float
    first: float
    """The first unit's all-gather, for which nothing has been computed yet."""
    last: float
    """The last unit's reduction, after which nothing is left to compute."""
    network: float
    """What a backward pass has to hide: collectives over the same links follow one another."""


def _communication(load: Load, machines: Machines, sharding: Sharding) -> _Times:
    shards, replicas = sharding.shards, sharding.num_replicas
    nodes = -(-shards // machines.gpus)  # Neighbouring ranks share a copy.
    bandwidth, latency = machines.bandwidth(nodes), machines.latency(shards, nodes)
    bytes_ = traffic(load.units, sharding, load.micro_batches)
    gathered = [unit for unit in load.units if unit.itemsize]
    reduced = [unit for unit in load.units if unit.learning]
    forward = len(gathered) * (load.micro_batches if sharding.reshard_after_forward else 1)
    again = sum(unit.read_in_backward for unit in gathered) * load.micro_batches * sharding.reshard_after_forward
    reduces = len(reduced) * (load.micro_batches if sharding.reduce_every_micro_batch else 1)
    gather = reduce = copies = first = last = 0.0
    if shards > 1:
        gather = bytes_.all_gather / bandwidth + (forward + again) * latency
        reduce = bytes_.reduce_scatter / bandwidth + reduces * latency
        others = (shards - 1) / shards
        first = latency + others * gathered[0].exchanged(shards) / bandwidth
        last = latency + others * reduced[0].reduced(shards) / bandwidth if reduced else 0.0
    across = -(-replicas * shards // machines.gpus)  # A shard's copies are on different machines, or share one.
    across = min(across, replicas)
    if replicas > 1:
        many = machines.latency(replicas, across, rounds=2)
        copies = bytes_.all_reduce / machines.bandwidth(across) + len(reduced) * many
        last += copies / len(reduced) if reduced else 0.0
    in_forward = gather * forward / (forward + again) if forward + again else 0.0
    inside, outside = gather - in_forward + reduce, copies
    same_links = (nodes > 1) == (across > 1)
    network = inside + outside if same_links else max(inside, outside)
    return _Times(gather, in_forward, reduce, copies, first, last, network)


def _waiting(load: Load, machines: Machines, gpus: int, step: float) -> float:
    """Seconds that a step waits for data, which workers load beside it."""
    if machines.samples_per_second is None:
        return 0.0
    here = load.samples * min(gpus, machines.gpus)
    return max(0.0, here / machines.samples_per_second - step)
