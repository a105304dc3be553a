"""One rank's rehearsal: its state is built and two of its steps are computed, with the trainer's own code."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from rlinf_core.contract.run import LoadedPlugins, RunConfig
from rlinf_core.data.sample import Sample
from rlinf_core.errors import UserError
from rlinf_core.rehearsal.collectives import Collective, Listening
from rlinf_core.rehearsal.fake_cuda import CUDA, Values, fake_cuda, place_of
from rlinf_core.torch_names import fake_tensors, memory_tracker
from rlinf_core.training.gradients import GradientHooks
from rlinf_core.training.settings import Fsdp2Settings
from rlinf_core.training.state.build import TrainState, build_state
from rlinf_core.training.step import TrainStep

STEPS = 2
"""The first is special: FSDP allocates lazily, and notes the order in which units are used."""


@dataclass(frozen=True)
class Rehearsed:
    """What a rank did in a rehearsal."""

    rank: int
    samples: int
    """Samples of a micro batch."""
    steps: tuple[tuple[Collective, ...], ...] = field(repr=False)
    """The collectives of each step."""
    peak_bytes: int
    """Most bytes of tensors at once on the device in the last step, by torch's own tracker; 0: not measured."""
    persistent_bytes: int
    """Bytes on the device before that step; 0: not measured."""
    waits: Mapping[str, int]
    """Lines of code at which the host waits for the device in a step, and how often."""

    @property
    def collectives(self) -> tuple[Collective, ...]:
        """Those of all steps."""
        return tuple(one for step in self.steps for one in step)


class RehearsalGroup:
    """The process group of a rehearsal: `contract.process_group.ProcessGroup` for a rank whose others are not there."""

    device = CUDA

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def decide(self, decision: Any) -> Any:
        """The decision, made here."""
        return decision()

    def gather(self, value: Any) -> list[Any]:
        """As if all ranks had the same value."""
        return [value] * self.size

    @contextmanager
    def first_on_each_machine(self) -> Iterator[None]:
        """Nobody else is on this machine."""
        yield

    def any(self, flag: bool) -> bool:
        """As if no other rank had set it."""
        return flag

    def wait(self) -> None:
        """Nobody is waited for."""

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """In place, as the trainer's group does."""
        dist.all_reduce(tensor)
        return tensor


class _Batching:
    """What a step asks its loader's dataset, `data.loading.micro_batches.MicroBatches`, besides batches."""

    def __init__(self, run: RunConfig, ranks: int) -> None:
        self.batching, self.sources = self, run.sources
        self.seed, self._ranks, self._size = run.seed, ranks, run.trainer.micro_batch_size
        self.accumulation = run.trainer.global_batch_size // (ranks * self._size)

    def places(self, micro: int, rank: int) -> Any:
        """As `MicroBatches.places`."""
        first = (micro * self._ranks + rank) * self._size
        return np.arange(first, first + self._size)


class _Recorder:
    """A flight recorder of a run that does not crash."""

    def enter(self, *_: Any) -> None:
        """Nothing is recorded."""


@dataclass(frozen=True, eq=False)
class _Trainer:
    """What hooks see of the trainer."""

    run: RunConfig
    step: int
    policy: Any
    optimizer: Any
    ema: Any


def rehearse_rank(
    run: RunConfig, plugins: LoadedPlugins, samples: Sequence[Sample], rank: int, ranks: int, *, measure: bool
) -> Rehearsed:
    """Build a rank's state and compute two of its steps on fake CUDA tensors.

    Args:
        run: The config, with eager blocks and bound to its data.
        plugins: The loaded plugins.
        samples: Those of one micro batch.
        rank: This rank.
        ranks: How many there are.
        measure: Whether to follow memory, which takes a third longer.

    Raises:
        UserError: Something of the run fails, or depends on values that do not exist here.
    """
    config = run.trainer
    assert isinstance(config, Fsdp2Settings)
    batch = run.policy.collate(list(samples))
    steps: list[tuple[Collective, ...]] = []
    peak = before = 0
    doing = "building the policy, its shards and its optimizer"
    try:
        with fake_cuda(rank, ranks) as values:
            group = RehearsalGroup(rank, ranks)
            state = build_state(run, config, group, plugins, None, filled=False, to_count=True)
            compute = _step(run, config, group, plugins, state)
            for number in range(STEPS):
                doing = f"step {number + 1}"
                last = number + 1 == STEPS
                with _measured(state, wanted=measure and last) as tracker:
                    steps.append(_heard(compute, number, batch, values))
                if tracker is not None:
                    before, peak = (_on_device(tracker, when) for when in ("before", "peak"))
    except UserError:
        raise
    except Exception as error:
        raise explained(error, rank, doing) from error
    waits = {line: count for line, count in values.waits.items() if line}
    return Rehearsed(rank, len(samples), tuple(steps), peak, before, waits)


def _step(run: RunConfig, config: Fsdp2Settings, group: Any, plugins: LoadedPlugins, state: TrainState) -> TrainStep:
    trainer: Any = _Trainer(run, 0, state.policy, state.optimizer, state.ema)
    stand_ins: Any = _Batching(run, group.size), _Recorder()
    batches, recorder = stand_ins
    hooks = GradientHooks.of(trainer, state.policy, group, plugins)
    return TrainStep(config, group, batches, state, recorder, gradients=hooks)


def _heard(compute: TrainStep, number: int, batch: Mapping[str, Any], values: Values) -> tuple[Collective, ...]:
    """Compute a step; returns its collectives."""
    values.waits.clear()

    def batches() -> Iterator[dict[str, Any]]:
        while True:
            yield dict(batch)

    with Listening() as listening, listening.labelled():
        compute(number, batches(), asked=lambda: False)
    compute.pause()  # Finishes an average on the CPU.
    return tuple(listening.heard)


@contextmanager
def _measured(state: TrainState, *, wanted: bool) -> Iterator[Any]:
    """Follow the memory of the body's tensors, if wanted."""
    if not wanted:
        yield None
        return
    tracker = memory_tracker()()
    for hook in ("_pre_fw_hook", "_post_fw_hook", "_pre_bw_hook", "_post_bw_hook"):
        setattr(tracker, hook, lambda *_: None)  # Sums by module, which FSDP's own hooks confuse.
    kept = [*state.tensors().values(), *state.policy.buffers()]
    tracker.track_external(*{id(one): one for one in kept}.values())
    tracker.before = tracker.get_tracker_snapshot()
    with tracker:
        yield tracker


def _on_device(tracker: Any, when: str) -> int:
    snapshot = tracker.before if when == "before" else tracker.get_tracker_snapshot("peak")
    return int(snapshot.get(CUDA, {}).get("Total", 0))


def explained(error: Exception, rank: int, doing: str) -> UserError:
    """The message for what went wrong on a rank."""
    fake = fake_tensors()
    line, said = place_of(error), " ".join(str(error).split()) or type(error).__name__
    where = f"the rehearsal fails on rank {rank} while {doing}" if "building" in doing else ""
    where = where or f"the rehearsal fails on rank {rank} in {doing}"
    if isinstance(error, fake.DataDependentOutputException | fake.DynamicOutputShapeException):
        return UserError(
            f"{where}, at {line}: {error} needs the values of a tensor, which exist only in training, and on a GPU the "
            "host would wait for them. Compute sizes on the host, in collate(), or select with torch.where"
        )
    if "two different devices" in said:
        operation = said.partition("Propagation for ")[2].partition(",")[0]
        devices = said.rpartition("devices ")[2]
        return UserError(
            f"{where}, at {line}: {operation} mixes tensors on {devices}. Create the tensor on the device of what it "
            "is combined with: device=x.device, or a buffer of the module"
        )
    return UserError(f"{where}, at {line}: {type(error).__name__}: {said}")
