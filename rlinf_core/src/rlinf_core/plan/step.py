"""Predict what a run takes before it starts: parameters, operations, bytes, traffic. No weights, network or device.

The policy's own code runs on the meta device on batches whose shapes come from the run's data (`costs.flops`); the
effect of sharding is computed from the result (`costs.memory`). No policy needs a formula.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from rlinf_core.contract.optim import TrainedParameter
from rlinf_core.contract.run import RunConfig
from rlinf_core.costs import memory
from rlinf_core.costs.flops import Counted, count
from rlinf_core.costs.memory import Activations, Memory, Parameter, Sharding, State, States, Traffic, Unit
from rlinf_core.data.loading.sampling import check_batch
from rlinf_core.data.sample import Batch, Sample
from rlinf_core.errors import UserError
from rlinf_core.plan.samples import SampledSource, bind_policy_at_hand, sample_sources
from rlinf_core.plugins.registry import Plugins
from rlinf_core.training.config import Fsdp2TrainerConfig
from rlinf_core.training.state.blocks import Checkpointing
from rlinf_core.training.state.build import DTYPES, build_on_meta, described_parameters, prepare_blocks
from rlinf_core.training.state.fsdp import gathered_together, unused_parameters
from rlinf_core.training.state.optim import decays

Keeping = Checkpointing | Literal["compiled"]
COUNTED_SAMPLES = 8
"""Batch size for counting the mean operations."""


@dataclass(frozen=True)
class Parameters:
    """The number of the policy's parameters."""

    total: int
    trainable: int
    """Those with optimizer state."""
    reached: int
    """Trainable parameters that the loss gives a gradient."""


@dataclass(frozen=True)
class Plan:
    """The predicted cost of a run."""

    run: RunConfig = field(repr=False)
    ranks: int
    parameters: Parameters
    states: States
    flops_per_sample: float
    """Useful operations of a sample's forward and backward pass."""
    flops_from: str
    """How they were determined, in words."""
    computed_per_sample: float
    """Operations executed for one of the longest samples, including padding and recomputation."""
    traffic: Traffic
    assumptions: tuple[str, ...]
    """What was not known, and what was assumed instead."""
    data: tuple[str, ...]
    """For each dataset, the rows that sizes were taken from."""
    has_blocks: bool
    """Whether the policy has blocks; activation checkpointing needs them."""
    units: tuple[Unit, ...] = field(repr=False)
    longest: Sample = field(repr=False)
    """The sample with the largest batch, for which memory is computed."""
    sampled: tuple[Sample, ...] = field(repr=False)
    """All that sizes were taken from."""
    activations: Mapping[Keeping, Activations] = field(repr=False)
    """Counted so far: for the run's own setting, and for others on request."""

    @property
    def trainer(self) -> Fsdp2TrainerConfig:
        """The run's `[trainer]`."""
        assert isinstance(self.run.trainer, Fsdp2TrainerConfig)
        return self.run.trainer

    @property
    def share(self) -> int:
        """Samples per rank and step."""
        return self.trainer.global_batch_size // self.ranks

    def memory(self, micro_batch: int | None = None, **changes: Any) -> Memory:
        """Bytes on a rank with the run's micro batch or another, and optionally with changed `[trainer]` settings."""
        size = micro_batch or self.trainer.micro_batch_size
        sharding, keep = self._with(changes)
        accumulates = size < self.trainer.global_batch_size // sharding.ranks
        return memory.step_memory(self.units, self.activations[keep], size, sharding, accumulates=accumulates)

    def largest_micro_batch(self, gpu_memory: float, **changes: Any) -> int:
        """The largest micro batch that fits a GPU (GB) and divides a rank's share of the batch; 0: none fits."""
        sharding, keep = self._with(changes)
        share = self.trainer.global_batch_size // sharding.ranks
        capacity = memory.usable(gpu_memory, sharding)
        return memory.largest_micro_batch(self.units, self.activations[keep], sharding, share, capacity)

    @property
    def sharding(self) -> Sharding:
        """How the run shards parameters."""
        return sharding_of(self.run, self.trainer, self.ranks)

    @property
    def compiled(self) -> bool:
        """Whether blocks are compiled."""
        return self.has_blocks and compiles(self.trainer)

    def counting(self, changes: Mapping[str, Any], plugins: Plugins) -> Plan:
        """The same plan with what blocks keep under changed `[trainer]` settings counted as well."""
        _, keep = self._with(changes)
        if keep in self.activations:
            return self
        counted = _count(self.run, plugins, self.longest, keep)
        return replace(self, activations={**self.activations, keep: counted.activations})

    def _with(self, changes: Mapping[str, Any]) -> tuple[Sharding, Keeping]:
        ranks = changes.get("ranks", self.ranks)
        trainer = self.trainer.model_copy(update={key: value for key, value in changes.items() if key != "ranks"})
        return sharding_of(self.run, trainer, ranks), what_blocks_keep(trainer)


def compiles(trainer: Fsdp2TrainerConfig) -> bool:
    """Whether a run compiles its blocks, on CUDA unless it asks for the CPU."""
    return trainer.compiles("cpu" if trainer.device == "cpu" else "cuda")


def what_blocks_keep(trainer: Fsdp2TrainerConfig) -> Keeping:
    """What decides which tensors blocks keep for their backward pass."""
    chosen = trainer.activation_checkpointing
    return "compiled" if chosen == "none" and compiles(trainer) else chosen


def sharding_of(run: RunConfig, trainer: Fsdp2TrainerConfig, ranks: int) -> Sharding:
    """How a run shards parameters over its ranks."""
    return Sharding(
        ranks=ranks,
        num_replicas=trainer.replicas(ranks, run.cluster.machines),
        reshard_after_forward=trainer.reshard_after_forward,
        reduce_every_micro_batch=trainer.reduce_every_micro_batch,
        cpu_offload=trainer.cpu_offload,
        ema=run.optim.ema_decay > 0,
        ema_on_cpu=trainer.ema_device == "cpu",
    )


def placed_on(run: RunConfig, ranks: int, machines: int) -> RunConfig:
    """The run with the number of copies of the model that it would have on so many machines, if that is `"auto"`."""
    if not isinstance(run.trainer, Fsdp2TrainerConfig):
        return run
    return run.model_copy(update={"trainer": run.trainer.placed(ranks, machines)})


def plan(run: RunConfig, plugins: Plugins, ranks: int | None = None) -> Plan:
    """Predict what a run takes.

    Args:
        run: The validated config.
        plugins: The loaded plugins.
        ranks: Number of processes; None: as many as `[cluster]` places, otherwise one.

    Raises:
        UserError: Batch sizes do not divide, the length of samples is unknown, or the policy cannot be built because
            files are missing.
    """
    trainer = run.trainer
    if not isinstance(trainer, Fsdp2TrainerConfig):
        raise UserError(f'rlinf plan supports only core\'s trainer "fsdp2", but trainer.type is {trainer.type!r}')
    assumptions: list[str] = []
    if ranks is None:
        placed = run.cluster.ranks
        ranks = run.cluster.machines if placed is None else len(placed)
        if placed is None:
            assumptions.append(f"{ranks} rank{'s' * (ranks > 1)}, because [cluster] does not set it: give --ranks")
    trainer.check_ranks(ranks)
    micro_batches = check_batch(trainer.global_batch_size, trainer.micro_batch_size, ranks)
    plugins.hook.rlinf_configure(run=run)
    run, unknown = bind_policy_at_hand(run, plugins)
    sampled = sample_sources(run, plugins)
    assumptions += unknown
    assumptions += [source.assumption for source in sampled if source.assumption]
    longest = _longest(run, sampled)
    keep = what_blocks_keep(trainer)
    counted = _count(run, plugins, longest, keep)
    units = counted.units
    useful, source = _useful_flops(run, plugins, sampled, changed=counted.changed)
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
        sampled=tuple(sample for source in sampled for sample in source.samples),
        activations={keep: counted.activations},
    )


@dataclass(frozen=True)
class _Counted:
    units: tuple[Unit, ...]
    activations: Activations
    flops: float
    """Per sample."""
    has_blocks: bool
    changed: bool
    """Whether plugins have changed which parameters there are or which of them train."""


def _count(run: RunConfig, plugins: Plugins, sample: Sample, keep: Keeping) -> _Counted:
    """Count micro batches of two sizes, with equal samples; large enough that rounding up hardly matters."""
    sizes = (1, 2) if run.trainer.micro_batch_size < 4 else (4, 8)
    policy, groups, changed, held = _build(run, plugins, "none" if keep == "compiled" else keep)
    compiled = [unit.module for unit in policy.shard_units() if unit.block] if keep == "compiled" else []
    batches = (run.policy.collate([sample] * size) for size in sizes)
    smaller, larger = (_count_batch(run, policy, batch, compiled) for batch in batches)
    units = _units(run, policy, groups, {name for name, _ in larger.moments}, held)
    grown = memory.activations_of(units, (sizes[0], smaller.moments), (sizes[1], larger.moments))
    has_blocks = any(unit.block for unit in policy.shard_units())
    return _Counted(units, grown, larger.flops / sizes[1], has_blocks, changed)


Groups = list[tuple[int, list[Any]]]
"""Bytes per number while gathered, and the parameters that are gathered together."""


Held = Mapping[Any, int]
"""Parameter -> bytes per number as a run holds it."""


def _build(run: RunConfig, plugins: Plugins, checkpointing: Checkpointing) -> tuple[Any, Groups, bool, Held]:
    """The policy on the meta device as the trainer would prepare it, each parameter in the dtype it is gathered in.

    Also returns whether plugins have changed what trains, and how parameters are held.
    """
    trainer = run.trainer
    assert isinstance(trainer, Fsdp2TrainerConfig)
    policy, adapters = build_on_meta(run, plugins, to_count=True)
    prepare_blocks(run, policy, checkpointing, wanted=trainer.asks_for_blocks)
    held = {parameter: parameter.itemsize for parameter in policy.parameters()}
    groups: Groups = []
    seen: set[Any] = set()
    together = gathered_together(policy, compute_dtype=DTYPES[trainer.param_dtype], min_unit_size=trainer.min_unit_size)
    for module, dtype in together:
        own = [parameter for parameter in module.parameters() if parameter not in seen]
        seen.update(own)
        for parameter in own:
            parameter.data = parameter.data.to(dtype)
        groups.append((dtype.itemsize, own))
    return policy, groups, adapters.changed, held


def _units(run: RunConfig, policy: Any, groups: Groups, reached: set[str], held: Held) -> tuple[Unit, ...]:
    described = {one.parameter: one for one in described_parameters(run.policy, policy)}
    kept = unused_parameters(policy)
    # If weight decay is lost in rounding, unused parameters never change and are not averaged either.
    decayed = decays(run.optim.lr, run.optim.unused_weight_decay)

    def parameter(one: TrainedParameter) -> Parameter:
        trainable = one.parameter.requires_grad and one.name not in kept
        state = _state_of(run, one) if trainable else State()
        return Parameter(
            one.name,
            tuple(one.parameter.shape),
            trainable=trainable,
            reached=one.name in reached,
            averaged=one.parameter.requires_grad and (one.name not in kept or decayed),
            state=state,
            itemsize=held[one.parameter],
        )

    once = {p for unit in policy.shard_units() if not unit.read_in_backward for p in unit.module.parameters()}
    return tuple(
        Unit(
            tuple(parameter(described[p]) for p in parameters),
            0 if kept.issuperset(described[p].name for p in parameters) else itemsize,
            read_in_backward=not once.issuperset(parameters),
        )
        for itemsize, parameters in groups
    )


def _state_of(run: RunConfig, one: TrainedParameter) -> State:
    """What the optimizer keeps of a parameter, by its own account: here parameters have the dtype they are gathered in,
    in a run it gets them in float32.
    """
    import torch

    whole = torch.nn.Parameter(torch.empty(one.parameter.shape, dtype=torch.float32, device="meta"))
    tensors = run.optim.initial_state(one._replace(parameter=whole)).values()
    like = [tensor for tensor in tensors if tensor.shape == whole.shape]
    others = [tensor for tensor in tensors if tensor.shape != whole.shape]
    return State(sum(tensor.itemsize for tensor in like), sum(tensor.nbytes for tensor in others))


def _longest(run: RunConfig, sampled: Sequence[SampledSource]) -> Sample:
    """The sample with the largest batch."""

    def size(sample: Sample) -> int:
        return sum(tensor.nbytes for tensor in _tensors(run.policy.collate([sample])))

    return max((sample for source in sampled for sample in source.samples), key=size)


def _tensors(batch: Any) -> list[Any]:
    if isinstance(batch, Mapping):
        return [tensor for value in batch.values() for tensor in _tensors(value)]
    return [batch] if hasattr(batch, "nbytes") else []


def _useful_flops(
    run: RunConfig, plugins: Plugins, sampled: Sequence[SampledSource], *, changed: bool
) -> tuple[float, str]:
    """Mean useful operations of a sample, and how they were determined."""
    size = min(run.trainer.micro_batch_size, COUNTED_SAMPLES)
    # A formula knows neither adapters nor which operations a frozen base saves.
    by_formula = [None] if changed else [_by_formula(run, source, size) for source in sampled]
    if None not in by_formula:
        shares = zip(sampled, by_formula, strict=True)
        return sum(source.share * (flops or 0.0) for source, flops in shares), "the policy's formula"
    policy, *_ = _build(run, plugins, "none")
    counted = 0.0
    for source in sampled:
        samples, batch = next(_batches(run, source, size))
        counted += source.share * _count_batch(run, policy, batch).flops / samples
    why = "plugins have changed what trains" if changed else "the policy has no useful_flops()"
    return counted, f"counted, padding included: {why}"


def _by_formula(run: RunConfig, source: SampledSource, size: int) -> float | None:
    total = 0.0
    for _, batch in _batches(run, source, size):
        flops = run.policy.useful_flops(batch)
        if flops is None:
            return None
        total += flops
    return total / len(source.samples)


def _batches(run: RunConfig, source: SampledSource, size: int) -> Iterator[tuple[int, Batch]]:
    """All samples of a source in batches, each with its number of samples."""
    for start in range(0, len(source.samples), size):
        samples = source.samples[start : start + size]
        yield len(samples), run.policy.collate(samples)


def _count_batch(run: RunConfig, policy: Any, batch: Batch, compiled: Sequence[Any] = ()) -> Counted:
    try:
        return count(policy, batch, compiled=compiled)
    except (RuntimeError, NotImplementedError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"the policy {run.policy.type!r} cannot be counted: its forward pass reads the value of a tensor, which "
            f"exists only in training ({reason}). Only values of integer and boolean tensors from collate() can be read"
        ) from error
