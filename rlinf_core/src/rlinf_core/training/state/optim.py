"""The optimizer step: what is the same for every optimizer. Float32 master weights, no host synchronisation.

Here are the global norm, clipping as the reference does (optax `clip_by_global_norm`), steps that are skipped because
something is NaN or infinite, the learning rate of the schedule, and a state that exists from the start. `optim.type`
chooses the optimizer, `optim.schedule` the learning rate (`contract.optim`). Torch and the standard library only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from rlinf_core.errors import PluginError
from rlinf_core.optimizers.parameters import TrainedParameter, on_shards
from rlinf_core.torch_names import shard_like
from rlinf_core.training.state.fsdp import local_shard


class StepResult(NamedTuple):
    """What an optimizer step reports: scalars on the device, so that the caller decides when to wait for them."""

    grad_norm: torch.Tensor
    """Global norm of the mean loss's gradient, before clipping."""
    lr: torch.Tensor
    """Learning rate of this step."""
    skipped: torch.Tensor
    """1.0 if the gradient or loss was not finite, so that nothing was changed; else 0.0."""


class Recipe(Protocol):
    """How an optimizer is made; `OptimizerConfig` describes each member."""

    @property
    def lr(self) -> float:
        """Peak learning rate."""
        ...

    @property
    def elementwise(self) -> bool:
        """Whether it is built over this rank's shards."""
        ...

    @property
    def unused_weight_decay(self) -> float:
        """Decoupled weight decay of parameters that the loss does not depend on."""
        ...

    def build(self, parameters: Sequence[TrainedParameter]) -> torch.optim.Optimizer:
        """Build the optimizer."""
        ...

    def initial_state(self, parameter: TrainedParameter) -> Mapping[str, torch.Tensor]:
        """The state of one parameter before the first step."""
        ...


class Optimizer:
    """A torch optimizer whose state exists from the start, so that checkpoints always have the same keys."""

    def __init__(
        self,
        parameters: Sequence[TrainedParameter],
        recipe: Recipe,
        lr_at: Callable[[torch.Tensor], torch.Tensor],
        *,
        clip_grad: float,
        unused: Sequence[nn.Parameter] = (),
        described: str = "",
    ) -> None:
        """See `OptimizerConfig` and `ScheduleConfig` for the settings.

        Args:
            parameters: What is trained.
            recipe: Builds the optimizer.
            lr_at: The learning rate of a step: `ScheduleConfig.lr_at`.
            clip_grad: Largest global gradient norm.
            unused: Parameters that the loss does not depend on: no state, only weight decay.
            described: The optimizer and who owns it, for messages.
        """
        self.parameters = {one.name: one.parameter for one in parameters}
        self._recipe, self._lr_at, self._unused = recipe, lr_at, unused
        self._described = described or type(recipe).__name__
        device = parameters[0].parameter.device
        self.clip_grad = clip_grad
        self.applied = torch.zeros((), dtype=torch.float32, device=device)
        """Number of steps that changed the weights; the schedule is a function of it."""
        self._lr = torch.zeros((), dtype=torch.float32, device=device)
        built = on_shards(parameters) if recipe.elementwise else list(parameters)
        self._built = {one.name: one.parameter for one in built}
        """What the optimizer knows: the parameters, or this rank's shards of them."""
        self._torch = recipe.build(built)
        self._check_parameters()
        # The fused kernels of torch, and Muon, take what scales gradients and what skips a step as tensors.
        self._scales = getattr(self._torch, "_step_supports_amp_scaling", False)
        self._decays = decays(recipe.lr, recipe.unused_weight_decay)
        self._factors = [float(group["lr"]) / recipe.lr for group in self._torch.param_groups]
        """Peak rate of each group of parameters, relative to `optim.lr`."""
        self._state = {one.name: dict(recipe.initial_state(one)) for one in built}
        for name, parameter in self._built.items():
            self._torch.state[parameter] = dict(self._state[name])

    def step(self, divisor: torch.Tensor | float = 1.0, loss: torch.Tensor | None = None) -> StepResult:
        """Apply the gradients once and clear them.

        An optimizer that scales the gradients as it reads them pays no pass over memory for the loss's weight and for
        clipping, and skips a step without asking the host. Others get scaled gradients, and the host decides.

        Args:
            divisor: Turns the stored gradients into those of the mean loss: total weight / data-parallel ranks.
            loss: Scalar, over all ranks. If it is not finite, the step is skipped even if the gradient is finite.
        """
        if isinstance(divisor, torch.Tensor):
            divisor = divisor.to(self.applied.device)  # Differs only if the parameters are offloaded to the CPU.
        norm = global_norm([p.grad for p in self.parameters.values() if p.grad is not None]).to(self.applied.device)
        norm = norm / divisor
        # optax.clip_by_global_norm: divide only when the norm exceeds the bound, and without an epsilon.
        excess = torch.where(norm > self.clip_grad, norm / self.clip_grad, torch.ones_like(norm))
        finite = torch.isfinite(norm)
        if loss is not None:
            finite &= torch.isfinite(loss).to(norm.device)
        skipped = (~finite).to(torch.float32)
        self._lr.copy_(self._lr_at(self.applied))
        self._set_rates()
        self._apply(excess * divisor, skipped)
        self._torch.zero_grad(set_to_none=True)
        for parameter in self.parameters.values():  # Of which the optimizer may know the shards only.
            parameter.grad = None
        self._decay(1.0 - skipped)
        self.applied += 1.0 - skipped
        return StepResult(grad_norm=norm, lr=self._lr.clone(), skipped=skipped)

    def _set_rates(self) -> None:
        """Set the rate of each group: in place if it is a tensor, else as a number, for which the host waits."""
        for group, factor in zip(self._torch.param_groups, self._factors, strict=True):
            rate = self._lr if factor == 1.0 else self._lr * factor
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].copy_(rate)
            else:
                group["lr"] = float(rate)

    def _apply(self, scale: torch.Tensor, skipped: torch.Tensor) -> None:
        for name, parameter in self.parameters.items():
            if self._built[name] is not parameter:
                self._built[name].grad = None if parameter.grad is None else local_shard(parameter.grad)
        if self._scales:
            # The attributes through which torch.amp.GradScaler passes these to fused optimizers.
            self._torch.grad_scale, self._torch.found_inf = scale, skipped  # type: ignore[attr-defined]
            self._torch.step()
        elif not bool(skipped):
            torch._foreach_div_([local_shard(p.grad) for p in self.parameters.values() if p.grad is not None], scale)
            self._torch.step()
        self._check_state()

    @torch.no_grad()
    def _decay(self, applied: torch.Tensor) -> None:
        """Apply weight decay to the unused parameters, as AdamW would with a gradient of zero."""
        if self._decays:
            factor = 1.0 - self._lr * self._recipe.unused_weight_decay * applied
            for parameter in self._unused:
                local_shard(parameter).mul_(factor)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """All tensors of the state as `<kind>.<parameter>`; loading writes into the memory of these tensors."""
        state = {"applied": self.applied}
        for name, kinds in self._state.items():
            state |= {f"{kind}.{name}": self._as_sharded(name, value) for kind, value in kinds.items()}
        return state

    def _as_sharded(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """A tensor of the state, as a DTensor if it is in the shape of a shard."""
        parameter, built = self.parameters[name], self._built[name]
        if parameter is built or not isinstance(parameter, DTensor) or value.shape != built.shape:
            return value
        return shard_like(parameter, value)

    def _check_parameters(self) -> None:
        """Raise `PluginError` if the optimizer does not train exactly the parameters that it was given."""
        there = {id(parameter) for group in self._torch.param_groups for parameter in group["params"]}
        if left_out := [name for name, parameter in self._built.items() if id(parameter) not in there]:
            raise PluginError(
                f"{self._described}: build() returned an optimizer without {left_out[0]}"
                f"{f' and {len(left_out) - 1} more' * (len(left_out) > 1)}, which would never change: "
                "give it all parameters, some of them in a group with lr = 0 if they are not to be trained"
            )
        if len(there) > len(self.parameters):
            raise PluginError(f"{self._described}: build() returned an optimizer of parameters that it was not given")

    def _check_state(self) -> None:
        """Raise `PluginError` if the optimizer keeps something that checkpoints would not hold."""
        for name, parameter in self._built.items():
            declared, state = self._state[name], self._torch.state[parameter]
            if unknown := [kind for kind in state if kind not in declared]:
                raise PluginError(
                    f"{self._described}: after a step, the state of {name} has {unknown[0]!r}, which initial_state() "
                    "does not return: checkpoints would lack it. Return it there, as a tensor"
                )
            if replaced := [kind for kind in declared if state.get(kind) is not declared[kind]]:
                raise PluginError(
                    f"{self._described}: a step replaced or removed the tensor {replaced[0]!r} in the state of {name}, "
                    "and checkpoints would hold the one before: change the tensor of initial_state() in place"
                )


def decays(lr: float, weight_decay: float) -> bool:
    """Whether weight decay changes a float32 number at all; the reference's 1e-10 at usual rates does not."""
    return bool(torch.tensor(1.0, device="cpu") - lr * weight_decay != 1.0)


def global_norm(gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """The norm of all gradients together, over all ranks: a plain scalar, the same on each.

    Every rank computes the norm of its shards; of these, one number per rank is summed up.

    Args:
        gradients: Float32; DTensors or plain tensors. Every rank passes the same ones, in the same order.
    """
    together: dict[tuple[object, ...], list[torch.Tensor]] = {}
    for gradient in gradients:
        sharding = (gradient.device_mesh, gradient.placements) if isinstance(gradient, DTensor) else ()
        together.setdefault(sharding, []).append(gradient)
    norms = [_norm_over_ranks(same) for same in together.values()]
    return norms[0] if len(norms) == 1 else torch.nn.utils.get_total_norm(norms)


def _norm_over_ranks(gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """The norm of gradients that are sharded alike."""
    norm = torch.nn.utils.get_total_norm([local_shard(gradient) for gradient in gradients])
    first = gradients[0]
    if isinstance(first, DTensor):
        mesh = first.device_mesh
        for dim, placement in enumerate(first.placements):
            if placement.is_partial():
                raise ValueError(f"gradients must be reduced before their norm is computed, not {first.placements}")
            if not placement.is_replicate() and mesh.size(dim) > 1:
                square = norm.to(mesh.device_type).square()  # Offloaded gradients are on the CPU.
                dist.all_reduce(square, group=mesh.get_group(dim))
                norm = square.sqrt()
    return norm
