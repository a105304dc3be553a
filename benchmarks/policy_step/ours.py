"""Our training step of π0 and π0.5, as in core's trainer. Needs torch and NumPy, and our source folders.

On a GPU the policy is sharded over that one GPU, as in a run: float32 master weights, bf16 products.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from rlinf_core.optimizers.adamw import AdamW
from rlinf_core.optimizers.parameters import TrainedParameter
from rlinf_core.optimizers.schedules import openpi_cosine
from rlinf_core.training.distributed.processes import to_device
from rlinf_core.training.state.blocks import prepare_block
from rlinf_core.training.state.ema import Ema
from rlinf_core.training.state.fsdp import materialize, set_gradient_sync, shard, unused_parameters
from rlinf_core.training.state.optim import Optimizer, decays
from rlinf_plugins_openpi.inputs.collate import stack
from rlinf_plugins_openpi.model.packing import pack
from rlinf_plugins_openpi.model.pi0 import Pi0

if TYPE_CHECKING:
    from rlinf_plugins_openpi.model.dimensions import Pi0Dimensions

ADAMW = AdamW(lr=2.5e-5, betas=(0.9, 0.95), eps=1e-8, weight_decay=1e-10)
SCHEDULE = partial(openpi_cosine, lr=ADAMW.lr, min_lr=2.5e-6, warmup_steps=1000, decay_steps=30_000)


class Options(NamedTuple):
    """Options of core's trainer, with its defaults except for `compiled`."""

    compute_dtype: torch.dtype = torch.bfloat16
    compiled: bool = True
    checkpointing: Any = "none"
    reshard_after_forward: bool = True
    reduce_every_micro_batch: bool = False


def plain(dimensions: Pi0Dimensions, *, compiled: bool = False) -> Pi0:
    """The policy in float32 on the CPU, uninitialised."""
    policy = Pi0(dimensions)
    _prepare(policy, checkpointing="none", compiled=compiled)
    return policy


def sharded(dimensions: Pi0Dimensions, device: torch.device, options: Options) -> Pi0:
    """The policy sharded over one process, with random weights."""
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    with torch.device("meta"):
        policy = Pi0(dimensions)
    _prepare(policy, checkpointing=options.checkpointing, compiled=options.compiled)
    shard(
        policy,
        init_device_mesh(device.type, (1,)),
        compute_dtype=options.compute_dtype,
        reshard_after_forward=options.reshard_after_forward,
        min_unit_size=1_000_000,
    )
    generator = torch.Generator(device).manual_seed(0)

    def value(_: str, shape: tuple[int, ...]) -> torch.Tensor:
        # Random, not zeros: products of round numbers need less power than those of real weights, and the clock rises.
        scale = 0.1 if len(shape) == 1 else math.prod(shape[1:]) ** -0.5
        return torch.randn(shape, device=device, generator=generator) * scale

    materialize(policy, device, value)
    return policy


def _prepare(policy: Pi0, *, checkpointing: Any, compiled: bool) -> None:
    if not decays(ADAMW.lr, ADAMW.weight_decay):
        for name in unused_parameters(policy):
            policy.get_parameter(name).requires_grad_(False)
    for unit in policy.shard_units():
        if unit.block:
            prepare_block(unit.module, checkpointing=checkpointing, compiled=compiled)


def collate(samples: list[dict[str, Any]], policy: Pi0) -> dict[str, Any]:
    """A batch as `Pi0Config.collate` makes it: missing cameras are left out."""
    batch = stack(samples)
    packing = pack(batch["image_mask"], batch["token_mask"], image_tokens=policy.dimensions.vision.num_tokens)
    return {**batch, "packing": packing}


class OurStep:
    """An optimizer step of ours: forward, backward, clipping, AdamW and, if wanted, the moving average.

    Args:
        policy: What `plain` or `sharded` returned.
        samples: The samples of a step.
        micro_batch: Samples that go through the model at a time.
        options: Those the policy was sharded with; None: it is not.
        ema_decay: Of the moving average of the weights; None: there is none.
    """

    def __init__(
        self,
        policy: Pi0,
        samples: list[dict[str, Any]],
        *,
        micro_batch: int,
        options: Options | None = None,
        ema_decay: float | None = None,
    ) -> None:
        self.policy, self.options = policy, options
        device = next(policy.parameters()).device
        starts = range(0, len(samples), micro_batch)
        self.batches = [to_device(collate(samples[i : i + micro_batch], policy), device) for i in starts]
        # betas, eps, decay and bound: the reference's, as in `Pi0Config`.
        unused = unused_parameters(policy)
        trained = [TrainedParameter(*named) for named in policy.named_parameters() if named[1].requires_grad]
        self.optimizer = Optimizer(
            [one for one in trained if one.name not in unused],
            ADAMW,
            SCHEDULE,
            clip_grad=1.0,
            unused=[one.parameter for one in trained if one.name in unused],
        )
        self.ema = None
        self.average(ema_decay)

    def average(self, decay: float | None) -> None:
        """Switch the moving average of the weights on or off."""
        self.ema = None if decay is None else Ema(self.policy, decay)

    def __call__(self) -> torch.Tensor:
        """One step; nothing is read on the host."""
        self.policy.train()
        totals: torch.Tensor | None = None
        for number, batch in enumerate(self.batches):
            if self.options is not None:
                set_gradient_sync(
                    self.policy,
                    last=number + 1 == len(self.batches),
                    reduce_every_micro_batch=self.options.reduce_every_micro_batch,
                    reshard=self.options.reshard_after_forward,
                )
            out = self.policy(batch)
            out.loss_sum.backward()
            found = torch.stack((out.loss_sum.detach(), out.weight))
            totals = found if totals is None else totals + found
        assert totals is not None
        skipped = self.optimizer.step(totals[1]).skipped
        if self.ema is not None:
            self.ema.update(skipped)
        return totals[0] / totals[1]

    def loss(self) -> torch.Tensor:
        """The mean loss of the step's samples."""
        with torch.no_grad():
            outs = [self.policy(batch) for batch in self.batches]
        loss: torch.Tensor = sum(out.loss_sum for out in outs) / sum(out.weight for out in outs)
        return loss


def counted_flops(dimensions: Pi0Dimensions, samples: list[dict[str, Any]]) -> float:
    """Operations of matrix products in a forward and backward pass, counted on the meta device, for any size.

    Attention is counted as matrix products: torch's counter knows no flash kernel of CPUs.
    """
    with torch.device("meta"):
        policy = Pi0(dimensions)
    batch = to_device(collate(samples, policy), torch.device("meta"))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        policy(batch).loss_sum.backward()
    return float(counter.get_total_flops())
