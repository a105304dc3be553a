"""A whole rehearsal: first, middle and last rank compared with each other and with what `rlinf plan` predicts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import Any

from rlinf_core.contract.run import RunConfig
from rlinf_core.costs.memory import Memory, Traffic, Unit
from rlinf_core.data.sample import Sample
from rlinf_core.errors import UserError
from rlinf_core.plan.step import Plan, plan
from rlinf_core.plugins.registry import Plugins
from rlinf_core.rehearsal.collectives import Collective, Difference, first_difference
from rlinf_core.rehearsal.rank import Rehearsed, rehearse_rank
from rlinf_core.training.config import Fsdp2TrainerConfig

KINDS = {"all-gather": "all_gather", "reduce-scatter": "reduce_scatter", "all-reduce": "all_reduce"}
"""Collectives of units -> fields of `costs.memory.Traffic`."""


@dataclass(frozen=True)
class Uneven:
    """A parameter whose rows the shards do not divide."""

    name: str
    rows: int
    shards: int
    padding: int
    """Numbers that ranks exchange and keep only because of this."""

    @property
    def without(self) -> int:
        """Ranks of a copy of the model that hold nothing of it."""
        chunk = -(-self.rows // self.shards)
        return self.shards - -(-self.rows // chunk)


@dataclass(frozen=True)
class Rehearsal:
    """What a rehearsal found."""

    plan: Plan
    """The run with eager blocks, as they were rehearsed."""
    ranks: tuple[Rehearsed, ...]
    difference: Difference | None
    """The first collective that differs between ranks; None: they agree."""
    uneven: tuple[Uneven, ...] = field(repr=False)
    notes: tuple[str, ...]
    """What was rehearsed otherwise than it will run."""

    @property
    def measured(self) -> Rehearsed:
        """The rank whose memory was followed."""
        return self.ranks[0]

    @property
    def predicted(self) -> Memory:
        """The plan's peak of the same step."""
        return self.plan.memory()

    @property
    def planned_persistent(self) -> float:
        """What the plan says is on the device between steps, when gradients are freed."""
        kept = self.plan.memory()
        return kept.weights + kept.optimizer + kept.ema

    @property
    def memory_over_plan(self) -> float:
        """Peak memory as rehearsed over that of the plan."""
        return self.measured.peak_bytes / self.predicted.total

    @property
    def traffic(self) -> Traffic:
        """Bytes that a rank receives in a step for its units, counted on its collectives."""
        return traffic_of(self.measured.steps[-1])

    @property
    def other_bytes(self) -> Mapping[str, float]:
        """Bytes that a rank receives in a step for anything else than its units, by collective and phase."""
        found: dict[str, float] = {}
        for one in self.measured.steps[-1]:
            if field_of(one) is None:
                key = f"{one.kind}, {one.where}"
                found[key] = found.get(key, 0.0) + one.received
        return found

    @property
    def bytes_over_formula(self) -> float:
        """Bytes of units as counted over those of the plan; 1 if both are 0."""
        planned = self.plan.traffic.total
        return self.traffic.total / planned if planned else 1.0 + self.traffic.total


def field_of(one: Collective) -> str | None:
    """The field of `Traffic` that a collective belongs to; None if it exchanges something else than units."""
    return KINDS.get(one.kind) if one.of_unit else None


def traffic_of(collectives: Sequence[Collective]) -> Traffic:
    """Bytes that a rank receives for its units."""
    sums = dict.fromkeys(KINDS.values(), 0.0)
    for one in collectives:
        if name := field_of(one):
            sums[name] += one.received
    return Traffic(**sums)


def rehearse(run: RunConfig, plugins: Plugins, ranks: int) -> Rehearsal:
    """Rehearse a run on so many ranks.

    Args:
        run: The validated config.
        plugins: The loaded plugins.
        ranks: Number of processes, at least one.

    Raises:
        UserError: The run cannot be rehearsed, or fails in its rehearsal.
    """
    if not isinstance(run.trainer, Fsdp2TrainerConfig):
        raise UserError(
            f'rlinf rehearse supports only core\'s trainer "fsdp2", whose steps it computes, but trainer.type is '
            f"{run.trainer.type!r}"
        )
    if run.trainer.cpu_offload:
        raise UserError(
            "trainer.cpu_offload cannot be rehearsed: its copies between CPU and GPU are not followed. Rehearse with "
            "trainer.cpu_offload=false, with which ranks exchange the same"
        )
    notes = list(_notes(run))
    trainer = run.trainer.model_copy(update={"compile": False, "device": "auto"})
    run = run.model_copy(update={"trainer": trainer})
    made = plan(run, plugins, ranks)
    chosen = sorted({0, ranks // 2, ranks - 1})
    run = made.run
    done = tuple(
        rehearse_rank(run, plugins, samples, rank, ranks, measure=rank == 0)
        for rank, samples in zip(chosen, _samples(made, len(chosen)), strict=True)
    )
    different = first_difference([(one.rank, one.collectives) for one in done])
    return Rehearsal(made, done, different, uneven_of(made.units, made.sharding.shards), tuple(notes))


def _notes(run: RunConfig) -> Iterator[str]:
    if run.trainer.device == "cpu":
        yield "on CUDA devices, although trainer.device is cpu"
    if getattr(run.trainer, "compile", None) is not False:
        yield "with eager blocks: compiled ones need less memory (`rlinf plan` predicts it) and exchange the same"


def _samples(made: Plan, count: int) -> Iterator[list[Sample]]:
    """For each rank the samples of a micro batch: the longest, then those of the data, then the shortest.

    What ranks exchange must not depend on their samples.
    """
    size = made.trainer.micro_batch_size
    yield [made.longest] * size
    if count > 2:
        yield list(islice(cycle(made.sampled), size))
    if count > 1:
        yield [min(made.sampled, key=_bytes)] * size


def _bytes(sample: Mapping[str, Any]) -> int:
    return sum(getattr(value, "nbytes", 0) for value in sample.values())


def uneven_of(units: Sequence[Unit], shards: int) -> tuple[Uneven, ...]:
    """Parameters whose rows a number of shards does not divide, those with the most padding first."""
    found = []
    for unit in units:
        for one in unit.parameters:
            if one.shape and one.shape[0] % shards and unit.itemsize:
                padding = one.shard(shards) * shards - one.numel
                found.append(Uneven(one.name, one.shape[0], shards, padding))
    return tuple(sorted(found, key=lambda one: -one.padding))


def check(found: Rehearsal) -> None:
    """Raise `UserError` if ranks would wait for each other."""
    if found.difference is not None:
        raise UserError(
            f"{found.difference}. What a rank exchanges must not depend on its number or its data: see "
            "docs/scaling.md#when-ranks-differ"
        )
