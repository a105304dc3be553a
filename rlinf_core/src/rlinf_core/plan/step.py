"""What a run will take, before it starts: parameters, operations, bytes, traffic. No weights, no network, no device.

The policy's own code runs on the meta device over batches whose shapes come from the run's data (`training.counting`);
sharding is arithmetic on that (`training.memory`). No policy needs a formula for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rlinf_core.contract.run import RunConfig
from rlinf_core.costs import memory
from rlinf_core.costs.flops import Counted, count
from rlinf_core.costs.memory import Activations, Memory, Parameter, Sharding, States, Traffic, Unit
from rlinf_core.data.loading.sampling import check_batch
from rlinf_core.data.sample import Batch, Sample
from rlinf_core.errors import UserError
from rlinf_core.plan.samples import SampledSource, know_data_at_hand, sample_sources
from rlinf_core.plugins.registry import Plugins
from rlinf_core.training.blocks import Checkpointing
from rlinf_core.training.build import DTYPES, build_on_meta, prepare_blocks
from rlinf_core.training.config import Fsdp2TrainerConfig
from rlinf_core.training.fsdp import gathered_together, unreached
from rlinf_core.training.optim import decays

COUNTED_SAMPLES = 8
"""Samples at once where mean operations are counted."""


@dataclass(frozen=True)
class Parameters:
    """How many numbers the policy has."""

    total: int
    trainable: int
    """Have optimizer state."""
    reached: int
    """Of those, the loss gives a gradient to so many."""


@dataclass(frozen=True)
class Plan:
    """What a run takes."""

    run: RunConfig = field(repr=False)
    ranks: int
    parameters: Parameters
    states: States
    flops_per_sample: float
    """Useful operations of a sample's forward and backward pass."""
    flops_from: str
    """Where they are from."""
    computed_per_sample: float
    """What the policy computes for one of the longest samples, padding and what is computed again included."""
    traffic: Traffic
    assumptions: tuple[str, ...]
    """What was not known, and what was taken instead."""
    data: tuple[str, ...]
    """Of each dataset, from which rows sizes were taken."""
    has_blocks: bool
    """Whether the policy names blocks, without which there is no activation checkpointing."""
    units: tuple[Unit, ...] = field(repr=False)
    longest: Sample = field(repr=False)
    """The sample whose batch is the largest: memory must do for it."""
    activations: Mapping[Checkpointing, Activations] = field(repr=False)
    """Counted so far: those of the run's own setting, and others that were asked for."""

    @property
    def trainer(self) -> Fsdp2TrainerConfig:
        """The run's `[trainer]`."""
        assert isinstance(self.run.trainer, Fsdp2TrainerConfig)
        return self.run.trainer

    @property
    def share(self) -> int:
        """Samples of a rank in a step."""
        return self.trainer.global_batch_size // self.ranks

    def memory(self, micro_batch: int | None = None, **changes: Any) -> Memory:
        """Bytes on a rank, with the run's micro batch or another one, and with other settings of `[trainer]`."""
        size = micro_batch or self.trainer.micro_batch_size
        sharding, checkpointing = self._with(changes)
        accumulates = size < self.trainer.global_batch_size // sharding.ranks
        return memory.step_memory(self.units, self.activations[checkpointing], size, sharding, accumulates=accumulates)

    def largest_micro_batch(self, card: float, **changes: Any) -> int:
        """The largest micro batch that fits a card of so many GB and divides a rank's share of the batch; 0: none."""
        sharding, checkpointing = self._with(changes)
        share = self.trainer.global_batch_size // sharding.ranks
        capacity = memory.usable(card)
        return memory.largest_micro_batch(self.units, self.activations[checkpointing], sharding, share, capacity)

    def counting(self, checkpointing: Checkpointing, plugins: Plugins) -> Plan:
        """The same, with another setting of `trainer.activation_checkpointing` counted, too."""
        if checkpointing in self.activations:
            return self
        counted = _count(self.run, plugins, self.longest, checkpointing)
        return replace(self, activations={**self.activations, checkpointing: counted.activations})

    def _with(self, changes: Mapping[str, Any]) -> tuple[Sharding, Checkpointing]:
        ranks = changes.get("ranks", self.ranks)
        trainer = self.trainer.model_copy(update={key: value for key, value in changes.items() if key != "ranks"})
        return sharding_of(self.run, trainer, ranks), trainer.activation_checkpointing


def sharding_of(run: RunConfig, trainer: Fsdp2TrainerConfig, ranks: int) -> Sharding:
    """How a run spreads parameters over its ranks."""
    return Sharding(
        ranks=ranks,
        num_replicas=trainer.num_replicas,
        reshard_after_forward=trainer.reshard_after_forward,
        reduce_every_micro_batch=trainer.reduce_every_micro_batch,
        cpu_offload=trainer.cpu_offload,
        ema=run.optim.ema_decay > 0,
        ema_on_cpu=trainer.ema_device == "cpu",
    )


def plan(run: RunConfig, plugins: Plugins, ranks: int | None = None) -> Plan:
    """Work out what a run takes.

    Args:
        run: The config, already valid in itself.
        plugins: The loaded plugins.
        ranks: Processes that will take part; None: as many as `[cluster]` places, else one.

    Raises:
        UserError: Sizes do not divide, neither data nor the policy tell how long samples are, or the policy cannot be
            built without files that are missing.
    """
    trainer = run.trainer
    if not isinstance(trainer, Fsdp2TrainerConfig):
        raise UserError(f'rlinf plan knows what core\'s trainer "fsdp2" does, and trainer.type is {trainer.type!r}')
    assumptions: list[str] = []
    if ranks is None:
        placed = run.cluster.ranks
        ranks = run.cluster.num_nodes if placed is None else len(placed)
        if placed is None:
            assumptions.append(f"{ranks} rank{'s' * (ranks > 1)}, as [cluster] does not say: give --ranks")
    trainer.check_ranks(ranks)
    micro_batches = check_batch(trainer.global_batch_size, trainer.micro_batch_size, ranks)
    plugins.hook.rlinf_configure(run=run)
    run, unknown = know_data_at_hand(run, plugins)
    sampled = sample_sources(run, plugins)
    assumptions += unknown
    assumptions += [source.assumption for source in sampled if source.assumption]
    if trainer.compile:
        assumptions.append("eager blocks: trainer.compile is not counted, with which they keep less")
    longest = _longest(run, sampled)
    counted = _count(run, plugins, longest, trainer.activation_checkpointing)
    units = counted.units
    useful, source = _useful_flops(run, plugins, sampled)
    whole = [parameter for unit in units for parameter in unit.parameters]
    sharding = sharding_of(run, trainer, ranks)
    return Plan(
        run=run,
        ranks=ranks,
        parameters=Parameters(
            sum(p.numel for p in whole),
            sum(p.numel for p in whole if p.trainable),
            sum(p.numel for p in whole if p.has_gradient),
        ),
        states=memory.states(units, sharding),
        flops_per_sample=useful,
        flops_from=source,
        computed_per_sample=counted.flops,
        traffic=memory.traffic(units, sharding, micro_batches),
        assumptions=tuple(assumptions),
        data=tuple(one.fact for one in sampled),
        has_blocks=counted.has_blocks,
        units=units,
        longest=longest,
        activations={trainer.activation_checkpointing: counted.activations},
    )


@dataclass(frozen=True)
class _Counted:
    units: tuple[Unit, ...]
    activations: Activations
    flops: float
    """Of a sample."""
    has_blocks: bool


def _count(run: RunConfig, plugins: Plugins, sample: Sample, checkpointing: Checkpointing) -> _Counted:
    """Count micro batches of two sizes, of equal samples; large enough that what is rounded up matters little."""
    sizes = (1, 2) if run.trainer.micro_batch_size < 4 else (4, 8)
    policy, groups = _build(run, plugins, checkpointing)
    smaller, larger = (_count_batch(run, policy, run.policy.collate([sample] * size)) for size in sizes)
    units = _units(run, policy, groups, {name for name, _ in larger.moments})
    grown = memory.activations_of(units, (sizes[0], smaller.moments), (sizes[1], larger.moments))
    has_blocks = any(unit.block for unit in policy.shard_units())
    return _Counted(units, grown, larger.flops / sizes[1], has_blocks)


Groups = list[tuple[int, list[Any]]]
"""Bytes of a number while gathered, and the parameters that are gathered together."""


def _build(run: RunConfig, plugins: Plugins, checkpointing: Checkpointing) -> tuple[Any, Groups]:
    """The policy on the meta device as the trainer would prepare it, each parameter in the dtype it is gathered in."""
    trainer = run.trainer
    assert isinstance(trainer, Fsdp2TrainerConfig)
    policy = build_on_meta(run, plugins, to_count=True)
    prepare_blocks(run, policy, checkpointing, compiled=False)
    groups: Groups = []
    seen: set[Any] = set()
    together = gathered_together(policy, compute_dtype=DTYPES[trainer.param_dtype], min_unit_size=trainer.min_unit_size)
    for module, dtype in together:
        own = [parameter for parameter in module.parameters() if parameter not in seen]
        seen.update(own)
        for parameter in own:
            parameter.data = parameter.data.to(dtype)
        groups.append((dtype.itemsize, own))
    return policy, groups


def _units(run: RunConfig, policy: Any, groups: Groups, reached: set[str]) -> tuple[Unit, ...]:
    names = {parameter: name for name, parameter in policy.named_parameters()}
    kept = unreached(policy)
    # Where weight decay is lost in rounding they do not change at all, and have no average either.
    decayed = decays(run.optim.lr, run.optim.weight_decay)
    return tuple(
        Unit(
            tuple(
                Parameter(
                    names[p],
                    tuple(p.shape),
                    trainable=p.requires_grad and names[p] not in kept,
                    reached=names[p] in reached,
                    averaged=p.requires_grad and (names[p] not in kept or decayed),
                )
                for p in parameters
            ),
            0 if kept.issuperset(names[p] for p in parameters) else itemsize,
        )
        for itemsize, parameters in groups
    )


def _longest(run: RunConfig, sampled: Sequence[SampledSource]) -> Sample:
    """The sample whose batch is the largest: memory must do for it."""

    def size(sample: Sample) -> int:
        return sum(tensor.nbytes for tensor in _tensors(run.policy.collate([sample])))

    return max((sample for source in sampled for sample in source.samples), key=size)


def _tensors(batch: Any) -> list[Any]:
    if isinstance(batch, Mapping):
        return [tensor for value in batch.values() for tensor in _tensors(value)]
    return [batch] if hasattr(batch, "nbytes") else []


def _useful_flops(run: RunConfig, plugins: Plugins, sampled: Sequence[SampledSource]) -> tuple[float, str]:
    """Mean useful operations of a sample, and where they are from."""
    size = min(run.trainer.micro_batch_size, COUNTED_SAMPLES)
    by_formula = [_by_formula(run, source, size) for source in sampled]
    if None not in by_formula:
        shares = zip(sampled, by_formula, strict=True)
        return sum(source.share * (flops or 0.0) for source, flops in shares), "the policy's formula"
    policy, _ = _build(run, plugins, "none")
    counted = 0.0
    for source in sampled:
        samples, batch = next(_batches(run, source, size))
        counted += source.share * _count_batch(run, policy, batch).flops / samples
    return counted, "counted, padding included: the policy has no useful_flops()"


def _by_formula(run: RunConfig, source: SampledSource, size: int) -> float | None:
    total = 0.0
    for _, batch in _batches(run, source, size):
        flops = run.policy.useful_flops(batch)
        if flops is None:
            return None
        total += flops
    return total / len(source.samples)


def _batches(run: RunConfig, source: SampledSource, size: int) -> Iterator[tuple[int, Batch]]:
    """All samples of a source in batches, with how many each has."""
    for start in range(0, len(source.samples), size):
        samples = source.samples[start : start + size]
        yield len(samples), run.policy.collate(samples)


def _count_batch(run: RunConfig, policy: Any, batch: Batch) -> Counted:
    try:
        return count(policy, batch)
    except (RuntimeError, NotImplementedError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"the policy {run.policy.type!r} cannot be counted: its forward pass needs the value of a number that is "
            f"known in training only ({reason}). What collate() gives as integers or truth values can be read"
        ) from error
