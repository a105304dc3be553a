"""A step's numbers: where its time goes, its metrics and sample losses, peak memory, TFLOP/s and MFU.

`StepClock` times the phases of a step on the device's own timeline: on CUDA with events that are read long after the
device has passed them, so that measuring waits for nothing; elsewhere with the host's clock. Phases follow one another,
so that their shares never sum to more than 1. `StepRecord` is a step whose numbers may still be on their way to the
host, `StepNumbers` what it reads. `Throughput` counts useful operations.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from rlinf_core.costs.flops import count
from rlinf_core.costs.gpus import peak_tflops
from rlinf_core.data.sample import ReplacedRow
from rlinf_core.errors import UserError
from rlinf_core.training.state.build import build_on_meta

if TYPE_CHECKING:
    from rlinf_core.contract.process_group import ProcessGroup
    from rlinf_core.contract.run import LoadedPlugins, RunConfig

PHASES = ("data_wait", "forward", "backward", "optimizer")

CORES_OWN = frozenset(
    {
        *("step", "epoch", "samples_per_second", "step_seconds", "save_stall_seconds", "peak_memory_gb"),
        *("tflops_per_second", "mfu", *(f"{phase}_share" for phase in PHASES)),
    }
)
"""Keys of a step's row besides the metrics of its loss, optimizer and policy."""
OTHER_ROWS = ("loss/", "val_", "ema_val_")
"""Prefixes of metrics of a mixture's sources and of validations."""

Mark = float | torch.cuda.Event
"""A point in time: seconds of the host's clock, or an event on the device's stream."""


class StepClock:
    """Times the phases of one step.

    `data_wait` is how long the device waited: a host that runs ahead may wait for a batch at no cost.

    Args:
        device: What the step computes on.
        before: The clock of the previous step, if only reporting came in between: this step then begins where that
            one ended. None: it begins now.
    """

    def __init__(self, device: torch.device, before: StepClock | None = None) -> None:
        self._cuda = device.type == "cuda"
        self._began: Mark = self._mark() if before is None else before._ended
        self._ended: Mark = self._began
        self._phases: list[tuple[str, Mark, Mark]] = []
        self._cpu_seconds = -time.thread_time()

    @contextmanager
    def time(self, phase: str) -> Iterator[None]:
        """Add the body's time to a phase; profiles show the body under the phase's name."""
        start = self._mark()
        with torch.profiler.record_function(phase):
            yield
        self._phases.append((phase, start, self._mark()))

    def stop(self) -> None:
        """Mark the end of the step; on CUDA, the point at which the device will have finished it."""
        self._ended = self._mark()
        self._cpu_seconds += time.thread_time()

    @property
    def cpu_seconds(self) -> float:
        """CPU time of this thread in the step, known after `stop`; waiting, e.g. for other ranks, does not count."""
        return self._cpu_seconds

    def read(self, samples: int) -> dict[str, float]:
        """The step's `samples_per_second`, `step_seconds` and phase shares; call it when the device is done."""
        seconds = max(_seconds(self._began, self._ended), 1e-9)
        spent = dict.fromkeys(PHASES, 0.0)
        for phase, start, end in self._phases:
            spent[phase] += _seconds(start, end)
        shares = {f"{phase}_share": one / seconds for phase, one in spent.items()}
        return {"samples_per_second": samples / seconds, "step_seconds": seconds} | shares

    def _mark(self) -> Mark:
        return record_event() if self._cuda else time.perf_counter()


@dataclass(frozen=True)
class StepNumbers:
    """The numbers of a step, the same on every rank except for the times among the metrics."""

    metrics: dict[str, float]
    by_source: list[float]
    """Loss sum and weight of each source of a mixture, alternating; empty for a run of one dataset."""
    asked: bool
    """Whether any rank had been asked to stop by the end of the step."""
    times: list[float]
    """`Stragglers.own_times` of each rank, at steps that compare ranks; else empty."""
    useful_tflop: float
    """Useful operations of the step over all ranks, in 10¹²; 0 if not known."""
    sample_losses: list[float]
    """[global batch], the loss of each sample, or its micro batch's mean if the policy does not return them."""
    has_sample_losses: bool
    """Whether the policy returns `PolicyOutput.sample_losses`."""
    replaced: int
    """How many bad rows were replaced, over all ranks."""


@dataclass(frozen=True)
class StepRecord:
    """A step whose numbers may still be on their way to the host."""

    step: int
    """Number of the step, from 1."""
    clock: StepClock
    _keys: tuple[str, ...]
    _sizes: tuple[int, ...]
    """Sizes of `_values`' parts: metrics, sums of sources, what ranks ask for and count, times, losses."""
    _values: torch.Tensor
    _arrived: torch.cuda.Event | None
    _has_sample_losses: bool
    replaced: tuple[ReplacedRow, ...] = ()
    """The bad rows that were replaced on this rank."""

    @property
    def is_here(self) -> bool:
        """Whether `read` returns without waiting."""
        return self._arrived is None or bool(self._arrived.query())  # type: ignore[no-untyped-call]

    def read(self, samples: int) -> StepNumbers:
        """The numbers; waits until the device has computed them.

        Args:
            samples: Number of samples in the step, over all ranks.
        """
        if self._arrived is not None:
            self._arrived.synchronize()
        values, by_source, counts, times, losses = (
            part.tolist() for part in torch.split(self._values, list(self._sizes))
        )
        metrics = dict(zip(self._keys, values, strict=True)) | self.clock.read(samples)
        asked, useful, replaced = counts
        has = self._has_sample_losses
        return StepNumbers(metrics, by_source, asked > 0, times, useful, losses, has, round(replaced))


def check_names(metrics: object, taken: Collection[str]) -> Mapping[str, Any]:
    """The metrics that a plugin adds to those of a step; empty for None.

    Args:
        metrics: A mapping from names to values.
        taken: Names of the step's other metrics.

    Raises:
        UserError: It is no mapping, or a name is not valid or taken.
    """
    if metrics is None:
        return {}
    if not isinstance(metrics, Mapping):
        raise UserError(f"expected a mapping from names to numbers, found {metrics!r}")
    for name in metrics:
        if not isinstance(name, str) or not name:
            raise UserError(f"expected the name of a metric, found {name!r}")
        if name in taken or name in CORES_OWN or name.startswith(OTHER_ROWS):
            raise UserError(f"the metric name {name!r} is taken: choose another, such as 'my_plugin/{name}'")
    return metrics


def as_number(name: str, value: Any) -> float:
    """A metric's value as a float: of a number, a NumPy scalar, or a tensor with one element.

    Raises:
        UserError: It is something else.
    """
    try:
        if isinstance(value, str | bytes):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"the metric {name!r} must be a number, not {type(value).__name__} {value!r:.100}") from error


def record_event() -> torch.cuda.Event:
    """A timed event at this point of the current stream."""
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def _seconds(start: Mark, end: Mark) -> float:
    if isinstance(start, float) or isinstance(end, float):
        assert isinstance(start, float)
        assert isinstance(end, float)
        return end - start
    milliseconds: float = start.elapsed_time(end)
    return milliseconds / 1000


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory of this process so far, in 10⁹ bytes: of tensors on its CUDA device, else resident on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


class Throughput:
    """Counts the useful operations of a run's micro batches, for TFLOP/s and MFU."""

    def __init__(
        self,
        run: RunConfig,
        policy: Any,
        group: ProcessGroup,
        plugins: LoadedPlugins,
        log: Callable[[str], None],
        *,
        changed: bool,
    ) -> None:
        """See `Monitor`.

        Args:
            run: The config.
            policy: The sharded policy.
            group: The processes.
            plugins: Plugins that change the policy whose operations are counted.
            log: Called with notes.
            changed: Whether plugins have changed what trains, so that the policy's own formula does not apply.
        """
        self._run, self._plugins, self._changed = run, plugins, changed
        self._ranks, self._log = group.size, log
        self._on_cuda = group.device.type == "cuda"
        self._peak = peak_tflops(torch.cuda.get_device_name(group.device)) if self._on_cuda else None
        self._trained = {name: parameter.requires_grad for name, parameter in policy.named_parameters()}
        self._counted: float | None = None

    def tflop(self, batch: Mapping[str, Any]) -> float:
        """Useful operations of a micro batch, in 10¹²; 0 if not known.

        Args:
            batch: The loader's batch, on the CPU.
        """
        flops = None if self._changed else self._run.policy.useful_flops(batch)
        if flops is None and self._on_cuda:
            flops = self._counted = self._count(batch) if self._counted is None else self._counted
        return (flops or 0.0) / 1e12

    def metrics(self, tflop: float, seconds: float) -> dict[str, float]:
        """`tflops_per_second` per rank and, on a GPU with a known peak, `mfu`; empty if `tflop` is 0.

        Args:
            tflop: Useful operations of a step in 10¹², over all ranks.
            seconds: Duration of the step.
        """
        if not tflop:
            return {}
        speed = tflop / seconds / self._ranks
        return {"tflops_per_second": speed} | ({"mfu": speed / self._peak} if self._peak else {})

    def _count(self, batch: Mapping[str, Any]) -> float:
        """Count the operations of one micro batch; all have the same number of samples."""
        try:
            twin, _ = build_on_meta(self._run, self._plugins, to_count=True)
            parameters = dict(twin.named_parameters())
            if parameters.keys() != self._trained.keys():
                raise RuntimeError("built again, it has other parameters")
            for name, parameter in parameters.items():
                parameter.requires_grad_(self._trained[name])
            flops = count(twin, batch).flops
        except (RuntimeError, NotImplementedError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            self._log(f"note: no mfu: {self._why()}, and its operations cannot be counted: {reason}")
            return 0.0
        self._log(f"note: mfu counts padding as useful: {self._why()}, so one micro batch was counted for all")
        return float(flops)

    def _why(self) -> str:
        return "plugins have changed what trains" if self._changed else "the policy has no useful_flops()"
