"""One optimizer step over the global batch, and the transfer of its numbers to the host.

Nothing in a step waits for the device. Its numbers are summed over the ranks in one collective and, on CUDA, copied
to page-locked memory, where `StepRecord.read` finds them some steps later; on the CPU they are available at once. The
module needs only torch and NumPy, so that it can be tested on a bare CUDA machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn

from rlinf_core.contract.process_group import ProcessGroup
from rlinf_core.data.sample import REPLACED, SOURCE, Batch, ReplacedRow
from rlinf_core.errors import UserError
from rlinf_core.training.distributed.processes import to_device
from rlinf_core.training.gradients import GradientHooks
from rlinf_core.training.monitor.flight_recorder import FlightRecorder
from rlinf_core.training.monitor.metrics import StepClock, StepRecord, record_event
from rlinf_core.training.state.adapters import UNUSED
from rlinf_core.training.state.fsdp import derived_seed, set_gradient_sync

if TYPE_CHECKING:
    from rlinf_core.contract.module import PolicyOutput
    from rlinf_core.contract.run import LoadedPlugins, Trainer
    from rlinf_core.data.loading.micro_batches import MicroBatches
    from rlinf_core.training.monitor.metrics import Throughput
    from rlinf_core.training.monitor.monitor import Monitor
    from rlinf_core.training.settings import Fsdp2Settings
    from rlinf_core.training.state.build import TrainState


class TrainStep:
    """Computes steps; every rank makes the same calls.

    A trainer that computes gradients in another way overrides `backpropagate`; numbers, hooks, clipping, the optimizer
    and the average of the weights stay as they are.
    """

    config: Fsdp2Settings
    """Settings of the trainer."""
    policy: Any
    """The sharded policy."""
    parameters: Mapping[str, nn.Parameter]
    """The trained parameters by name: shards, also while a pass has gathered them."""

    def __init__(
        self,
        config: Fsdp2Settings,
        group: ProcessGroup,
        batches: MicroBatches,
        state: TrainState,
        recorder: FlightRecorder,
        throughput: Throughput | None = None,
        log: Callable[[str], object] | None = None,
        gradients: GradientHooks | None = None,
    ) -> None:
        self._adapters, self._log = state.adapters, log
        self.config, self._group, self._batches = config, group, batches
        self.policy, self._optimizer, self._ema = state.policy, state.optimizer, state.ema
        self.parameters = state.optimizer.parameters
        self._recorder, self._throughput, self._useful = recorder, throughput, 0.0
        self._gradients = gradients
        self._places = [
            torch.from_numpy(batches.places(micro, group.rank)).to(group.device)
            for micro in range(batches.accumulation)
        ]
        self._clock: StepClock | None = None

    @classmethod
    def of(
        cls,
        trainer: Trainer,
        config: Fsdp2Settings,
        group: ProcessGroup,
        plugins: LoadedPlugins,
        batches: MicroBatches,
        state: TrainState,
        monitor: Monitor,
    ) -> Self:
        """The steps of a run, with plugins' hooks, reported to its monitor.

        Args:
            trainer: Passed to hooks.
            config: Settings of the trainer.
            group: All ranks.
            plugins: Their `rlinf_gradients_ready` is called.
            batches: The run's micro batches, `RunData.loader(...).dataset`.
            state: What a step changes.
            monitor: Records phases and counts operations.
        """
        return cls(
            config,
            group,
            batches,
            state,
            monitor.recorder,
            monitor.throughput,
            log=monitor.log,
            gradients=GradientHooks.of(trainer, state.policy, group, plugins),
        )

    def pause(self) -> None:
        """Before anything else than a step: the time until the next one does not count as step time, and the average
        of the weights is brought up to date.
        """
        self._clock = None
        if self._ema:
            self._ema.finish()

    def __call__(
        self, step: int, batches: Iterator[Any], *, asked: Callable[[], bool], times: tuple[float, float] | None = None
    ) -> StepRecord:
        """Compute the step after `step` finished ones.

        Args:
            step: Finished steps.
            batches: This rank's micro batches.
            asked: Whether this rank was asked to stop; called just before the ranks exchange their numbers.
            times: `Stragglers.own_times` of this rank, at steps that compare ranks.
        """
        clock = self._clock = StepClock(self._group.device, self._clock)
        self._recorder.enter("data_wait", step + 1)
        self.policy.train()
        device, size = self._group.device, self.config.global_batch_size
        sums, losses = torch.zeros(()), torch.zeros(size, device=device)
        names: list[str] = []
        self._useful = 0.0
        self._replaced: list[ReplacedRow] = []
        for micro in range(self._batches.accumulation):
            out, numbers = self._backpropagate(step, micro, batches, clock)
            names = sorted(out.metrics)
            own = torch.stack([out.loss_sum.detach(), out.weight, *(out.metrics[name] for name in names)])
            if numbers is not None:
                own = torch.cat([own, source_sums(out, numbers, len(self._batches.sources))])
            sums = own if not micro else sums + own
            losses[self._places[micro]] = self._losses(out)
        if self._log:  # Once: gradients are cleared with every step.
            for warning in self._adapters.gradient_warnings(self._optimizer.parameters):
                self._log(warning)
            self._log = None
        # Whatever else ranks exchange travels with the sums, so that a step needs no further collective.
        counts = (float(asked()), self._useful, float(len(self._replaced)))
        request = torch.cat([losses.new_full((1,), count) for count in counts])
        parts = [sums, request, self._own_times(times), losses]
        with self._phase(clock, "optimizer"):
            totals = self._group.sum(torch.cat(parts))
            keys = ("loss", "lr", "grad_norm", "skipped", *names)
            added = self._gradients(step + 1, self._group.size / totals[1], keys) if self._gradients else {}
            if self._ema:
                self._ema.before_step()
            # FSDP stored the mean over ranks of each rank's gradients; the loss is sum / weight (contract 4).
            result = self._optimizer.step(divisor=totals[1] / self._group.size, loss=totals[0])
            if self._ema:
                self._ema.update(result.skipped)
            optimizer = torch.stack([result.lr, result.grad_norm, result.skipped]).to(device)
        clock.stop()
        last = 2 + len(names)
        mean = totals[:last] / totals[1]
        values = torch.cat([mean[:1], optimizer, mean[2:], *added.values(), totals[last:]])
        keys += tuple(added)
        by_source = len(sums) - last
        sizes = (len(keys), by_source, len(request), len(parts[2]), size)
        has_sample_losses = out.sample_losses is not None
        replaced = tuple(self._replaced)
        return StepRecord(step + 1, clock, keys, sizes, *_to_host(values), has_sample_losses, replaced)

    def _seed(self, seed: int) -> None:
        torch.default_generator.manual_seed(seed)  # `torch.manual_seed` records a stack trace per other device.
        if self._group.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def _backpropagate(
        self, step: int, micro: int, batches: Iterator[Any], clock: StepClock
    ) -> tuple[PolicyOutput, torch.Tensor | None]:
        """Forward and backward of a micro batch; returns the output and, in a mixture, the source of each sample."""
        if self._batches.accumulation > 1:
            set_gradient_sync(
                self.policy,
                last=micro + 1 == self._batches.accumulation,
                reduce_every_micro_batch=self.config.reduce_every_micro_batch,
                reshard=self.config.reshard_after_forward,
            )
        with self._phase(clock, "data_wait"):
            batch = next(batches)
        self._useful += self._throughput.tflop(batch) if self._throughput else 0.0  # The batch is still on the host.
        # Modules with their own randomness (dropout) draw the same numbers after a resume.
        self._seed(derived_seed(self._batches.batching.seed, step, self._group.rank, micro))
        batch, numbers = dict(batch), batch.get(SOURCE)
        batch.pop(SOURCE, None)  # For core, not for the policy.
        self._replaced += batch.pop(REPLACED, ())
        out = self.backpropagate(batch, partial(self._phase, clock))
        return out, None if numbers is None else numbers.to(self._group.device, non_blocking=True)

    def backpropagate(self, batch: Batch, phase: Callable[[str], AbstractContextManager[None]]) -> PolicyOutput:
        """Compute a micro batch: the forward pass, and the backward pass, which adds to the parameters' gradients.

        Args:
            batch: From the loader, still on the host.
            phase: `with phase("forward"):` measures the body as that phase of the step; also `"backward"`.

        Returns:
            The output whose loss and metrics are reported.
        """
        with phase("forward"):
            out: PolicyOutput = self.policy(to_device(batch, self._group.device))
        if self._adapters.changed and not out.loss_sum.requires_grad:
            raise UserError(
                "the loss depends on no parameter that is trained: plugins have frozen the policy, and it does not use "
                f"what they have added. {UNUSED}"
            )
        with phase("backward"):
            torch.autograd.backward(out.loss_sum)
        return out

    @contextmanager
    def _phase(self, clock: StepClock, name: str) -> Iterator[None]:
        self._recorder.enter(name)
        with clock.time(name):
            yield

    def _losses(self, out: PolicyOutput) -> torch.Tensor:
        """[B], the loss of each sample of a micro batch, or a scalar, their mean."""
        if out.sample_losses is None:
            return out.loss_sum.detach() / out.weight
        loss, weight = out.sample_losses.unbind(1)
        return torch.where(weight > 0, loss / weight, loss)

    def _own_times(self, times: tuple[float, float] | None) -> torch.Tensor:
        """[2 * ranks], zero but for this rank's times, at steps that compare ranks; [0] otherwise."""
        table = torch.zeros(2 * self._group.size if times else 0, device=self._group.device)
        for place, seconds in enumerate(times or (), start=2 * self._group.rank):
            table[place].fill_(seconds)
        return table


def source_sums(output: PolicyOutput, numbers: torch.Tensor, count: int) -> torch.Tensor:
    """[2 * count], loss sum and weight of each source in a micro batch; zeros without `PolicyOutput.sample_losses`.

    Args:
        output: The result of the forward pass.
        numbers: [B], the source of each sample.
        count: Number of sources.
    """
    if output.sample_losses is None:
        return output.loss_sum.detach().new_zeros(2 * count)
    # Not index_add_, whose order of addition on a GPU is not deterministic.
    mine = numbers == torch.arange(count, device=numbers.device)[:, None]
    # Multiplying by the mask would spread a NaN loss to every source.
    return torch.where(mine[..., None], output.sample_losses, 0.0).sum(1).flatten()


def _to_host(values: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event | None]:
    """The values in host memory, and the event after which they have arrived (None: they already have)."""
    if values.device.type != "cuda":
        return values, None
    landing = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    landing.copy_(values, non_blocking=True)
    return landing, record_event()
