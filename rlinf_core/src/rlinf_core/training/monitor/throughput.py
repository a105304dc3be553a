"""How much of what the hardware can do is put to use: operations worth doing a second, and their share of the peak.

Useful operations of a micro batch are worked out on the host, from the batch that the loader made, so that no device is
waited for: by the policy's formula (`PolicyConfig.useful_flops`), or on CUDA by counting one micro batch on the meta
device, which takes padding for useful.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from rlinf_core.costs.flops import count
from rlinf_core.costs.gpus import peak_tflops

if TYPE_CHECKING:
    from rlinf_core.contract.run import RunConfig
    from rlinf_core.training.distributed.processes import Processes


class Throughput:
    """Useful operations of a run's micro batches, and what they amount to."""

    def __init__(self, run: RunConfig, policy: Any, group: Processes, say: Callable[[str], None]) -> None:
        self._config = run.policy
        self._ranks, self._say = group.size, say
        self._on_cuda = group.device.type == "cuda"
        self._peak = peak_tflops(torch.cuda.get_device_name(group.device)) if self._on_cuda else None
        self._trained = {name: parameter.requires_grad for name, parameter in policy.named_parameters()}
        self._counted: float | None = None

    def tflop(self, batch: Mapping[str, Any]) -> float:
        """Useful operations of a micro batch, in 10¹²; 0 if they are not known.

        Args:
            batch: As the loader made it, on the CPU.
        """
        flops = self._config.useful_flops(batch)
        if flops is None and self._on_cuda:
            flops = self._counted = self._count(batch) if self._counted is None else self._counted
        return (flops or 0.0) / 1e12

    def metrics(self, tflop: float, seconds: float) -> dict[str, float]:
        """`tflops_per_second` of a rank, and on a card whose peak is known `mfu`; nothing where nothing is known.

        Args:
            tflop: Useful operations of a step, over all ranks.
            seconds: That the step took.
        """
        if not tflop:
            return {}
        speed = tflop / seconds / self._ranks
        return {"tflops_per_second": speed} | ({"mfu": speed / self._peak} if self._peak else {})

    def _count(self, batch: Mapping[str, Any]) -> float:
        """Operations of a micro batch; all have the same number of samples."""
        try:
            with torch.device("meta"):
                twin: Any = self._config.build_to_count()
            parameters = dict(twin.named_parameters())
            if parameters.keys() != self._trained.keys():
                raise RuntimeError("a plugin has changed its parameters")
            for name, parameter in parameters.items():
                parameter.requires_grad_(self._trained[name])
            flops = count(twin, batch).flops
        except (RuntimeError, NotImplementedError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            self._say(f"note: no mfu: the policy has no useful_flops(), and cannot be counted: {reason}")
            return 0.0
        self._say("note: mfu takes padding for useful: the policy has no useful_flops(), one micro batch was counted")
        return float(flops)
