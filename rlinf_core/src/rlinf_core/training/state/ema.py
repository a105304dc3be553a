"""An exponential moving average of the weights: float32, sharded like them, unchanged by skipped steps.

Torch and the standard library only. The reference is openpi's JAX training loop: after each step the average becomes
decay · average + (1 - decay) · weights, starting from the initial weights, without bias correction.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import nn

from rlinf_core.training.state.fsdp import local_shard, release


class AverageElsewhere:
    """Updates averages that are on another device than the weights, while the next step is computed.

    The weights are copied to page-locked memory by a stream of their own, and a thread averages them once they are
    there. So neither the host nor the device's main stream waits, unless the CPU takes longer than a step.

    Args:
        shards: Each average, and its weights.
    """

    def __init__(self, shards: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        self._averages = [average for average, _ in shards]
        self._weights = [weights for _, weights in shards]
        first = self._weights[0]
        self._stream = torch.cuda.Stream(first.device) if first.is_cuda else None  # type: ignore[no-untyped-call]
        pinned = self._stream is not None
        self._landed = [torch.empty_like(one, device="cpu", pin_memory=pinned) for one in self._weights]
        self._weight = torch.empty((), dtype=torch.float32, pin_memory=pinned)
        self._copied = torch.cuda.Event() if pinned else None  # type: ignore[no-untyped-call]
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="average")
        self._pending: Future[None] | None = None

    @torch.no_grad()
    def update(self, weight: torch.Tensor) -> None:
        """Start an update: averages += weight · (weights - averages). `weight` is a scalar on the weights' device."""
        self.finish()  # Else weights would land where the thread still reads.
        if self._stream is None or self._copied is None:
            self._copy(weight)
        else:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
            with torch.cuda.stream(self._stream):
                self._copy(weight)
                self._copied.record(self._stream)
            weight.record_stream(self._stream)
        self._pending = self._thread.submit(self._average)

    def _copy(self, weight: torch.Tensor) -> None:
        self._weight.copy_(weight, non_blocking=True)
        for landed, weights in zip(self._landed, self._weights, strict=True):
            landed.copy_(weights, non_blocking=True)

    @torch.no_grad()
    def _average(self) -> None:
        if self._copied is not None:
            self._copied.synchronize()
        if weight := float(self._weight):
            torch._foreach_lerp_(self._averages, self._landed, weight)

    def wait_on_device(self) -> None:
        """Let the weights' stream wait until they are copied."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)

    def finish(self) -> None:
        """Wait for the last update."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None


class Ema:
    """The average of a policy's trainable parameters; frozen ones need no copy.

    Args:
        policy: The sharded policy, with its initial weights.
        decay: 0 < decay < 1.
        device: Device of the average; None: that of the parameters.
    """

    def __init__(self, policy: nn.Module, decay: float, device: torch.device | None = None) -> None:
        self._policy = policy
        self._decay = decay
        self._parameters = {name: p for name, p in policy.named_parameters() if p.requires_grad}
        self._averages: dict[str, torch.Tensor] = {
            name: p.detach().to(device=device or p.device, copy=True) for name, p in self._parameters.items()
        }
        # Plain tensors: an operation on DTensors takes longer than on its shards (`optimizers.parameters.on_shards`).
        self._shards = [
            (local_shard(self._averages[name]), local_shard(parameter)) for name, parameter in self._parameters.items()
        ]
        elsewhere = any(average.device != weights.device for average, weights in self._shards)
        self._elsewhere = AverageElsewhere(self._shards) if elsewhere else None

    @torch.no_grad()
    def update(self, skipped: torch.Tensor) -> None:
        """Update the average after a step. The host does not wait, nor does the device.

        Args:
            skipped: 1.0 if the step was skipped, which leaves the average unchanged; else 0.0.
        """
        weight = (1.0 - self._decay) * (1.0 - skipped)
        if self._elsewhere:
            self._elsewhere.update(weight)
            return
        for average, weights in self._shards:
            if weight.device != average.device:  # A device's number, but offloaded parameters.
                weight = weight.to(average.device)
            average.lerp_(weights, weight)

    def before_step(self) -> None:
        """Called before weights change: lets the device finish copying those of the previous step."""
        if self._elsewhere:
            self._elsewhere.wait_on_device()

    def finish(self) -> None:
        """Wait until the average is up to date, before it is read."""
        if self._elsewhere:
            self._elsewhere.finish()

    def state_dict(self) -> Mapping[str, torch.Tensor]:
        """The averages by parameter name; loading writes into these tensors. Call `finish` before reading them."""
        self.finish()
        return self._averages

    @contextmanager
    def in_place_of_weights(self) -> Iterator[None]:
        """Let the policy compute with the averages; afterwards the weights are restored exactly."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        self.finish()
        release(self._policy)  # Gathered parameters would still have the previous values.
        for average, weights in self._shards:
            kept = weights.clone()
            weights.copy_(average)
            average.copy_(kept)
