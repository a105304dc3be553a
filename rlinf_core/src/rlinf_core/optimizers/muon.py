"""Muon on sharded parameters: matrices by momentum and orthogonalisation, everything else by AdamW.

A step follows `torch.optim.Muon`, which knows whole matrices only. It reads nothing back from the device: like torch's
fused optimizers, it takes the gradients' divisor and whether to skip the step as tensors (`grad_scale`, `found_inf`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from rlinf_core.optimizers.adamw import AdamW, rate_tensor
from rlinf_core.optimizers.orthogonal import Iterations, Matrix, Sharding, orthogonalize, rate_factor
from rlinf_core.optimizers.parameters import TrainedParameter, on_shards


class Settings(NamedTuple):
    """How matrices are trained."""

    lr: float
    momentum: float
    nesterov: bool
    iterations: Iterations
    weight_decay: float
    adjust_lr: str
    """See `orthogonal.rate_factor`."""


def is_matrix(parameter: TrainedParameter) -> bool:
    """Whether Muon trains a parameter: two axes, in one of the policy's repeated blocks."""
    return parameter.in_block and parameter.parameter.ndim == 2


class Muon(torch.optim.Optimizer):
    """Two parameter groups: `muon`, the matrices, and `adamw`, the rest; each may be empty, but not both."""

    def __init__(self, parameters: Sequence[TrainedParameter], settings: Settings, adamw: AdamW) -> None:
        """See `MuonConfig` for the settings."""
        self._settings = settings
        matrices = [one for one in parameters if is_matrix(one)]
        rest = [one for one in parameters if not is_matrix(one)]
        self._matrices = {one.parameter: list(matrices_in(one)) for one in matrices}
        groups = [
            {"params": [one.parameter for one in members], "lr": rate_tensor(members, lr), "name": name}
            for name, members, lr in (("muon", matrices, settings.lr), ("adamw", rest, adamw.lr))
            if members
        ]
        super().__init__(groups, {})
        self._step_supports_amp_scaling = True
        self.grad_scale: torch.Tensor | None = None
        self.found_inf: torch.Tensor | None = None
        self._rest = list(zip([one.parameter for one in rest], on_shards(rest), strict=True))
        self._adamw = adamw.build([shard for _, shard in self._rest]) if rest else None
        if self._adamw:  # One learning rate for both, so that either may be asked for it.
            self._adamw.param_groups[0]["lr"] = self.param_groups[-1]["lr"]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Apply the gradients once. They are overwritten."""
        if closure is not None:
            raise ValueError("Muon takes no closure")
        if self._adamw:
            self._adamw.grad_scale, self._adamw.found_inf = self.grad_scale, self.found_inf  # type: ignore[attr-defined]
            self._step_rest(self._adamw)
        if self._matrices:
            self._step_matrices(self.param_groups[0]["lr"])

    def _step_rest(self, adamw: torch.optim.Optimizer) -> None:
        """AdamW works on this rank's shards; the state that it changes is that of the parameters."""
        for parameter, (_, shard, *_) in self._rest:
            shard.grad = None if parameter.grad is None else _local(parameter.grad)
            if shard not in adamw.state:
                adamw.state[shard] = {kind: _local(value) for kind, value in self.state[parameter].items()}
        adamw.step()
        adamw.zero_grad(set_to_none=True)

    def _step_matrices(self, lr: torch.Tensor) -> None:
        used = [parameter for parameter in self._matrices if parameter.grad is not None]
        rate = lr if self.found_inf is None else lr * (1.0 - self.found_inf)  # A skipped step moves by zero.
        kept = 1.0 - rate * self._settings.weight_decay
        for parameter in used:
            self._update_momentum(_local(parameter.grad), _local(self.state[parameter]["momentum_buffer"]))
            _local(parameter).mul_(kept)
        for sharding, matrices in self._by_sharding(used):
            found = orthogonalize(matrices, self._update_rows, sharding, self._settings.iterations)
            for matrix, place, direction in found:
                weights = _local(matrix.parameter)[place]
                factor = -rate * rate_factor(matrix.rows, matrix.columns, self._settings.adjust_lr)
                weights.addcmul_(direction.to(weights.device, torch.float32), factor)

    def _update_momentum(self, gradient: torch.Tensor, momentum: torch.Tensor) -> None:
        """Scale the gradient, and add it to its moving average; a step that is skipped changes no average."""
        if self.grad_scale is not None:
            gradient.div_(self.grad_scale)
        if self.found_inf is not None:  # NaN and infinity must not reach the momentum, not even times zero.
            gradient.copy_(torch.where(self.found_inf > 0, momentum, gradient))
        momentum.lerp_(gradient, 1.0 - self._settings.momentum)

    def _update_rows(self, matrix: Matrix, place: slice) -> torch.Tensor:
        """This rank's rows of the matrix that is orthogonalised."""
        momentum = _local(self.state[matrix.parameter]["momentum_buffer"])[place]
        if not self._settings.nesterov:
            return momentum
        return _local(matrix.parameter.grad)[place].lerp(momentum, self._settings.momentum)

    def _by_sharding(self, parameters: Iterable[nn.Parameter]) -> Iterable[tuple[Sharding, list[Matrix]]]:
        groups: dict[Sharding, list[Matrix]] = {}
        for parameter in parameters:
            groups.setdefault(Sharding.of(parameter), []).extend(self._matrices[parameter])
        return groups.items()


def matrices_in(one: TrainedParameter) -> Iterable[Matrix]:
    """The matrices that a parameter stacks, as they are published: a packed parameter is several."""
    rows = list(one.parts.values()) or [one.parameter.shape[0]]
    starts = accumulate(rows, initial=0)
    return (
        Matrix(one.parameter, start, count, one.parameter.shape[1]) for start, count in zip(starts, rows, strict=False)
    )


def _local(tensor: torch.Tensor | None) -> torch.Tensor:
    assert tensor is not None
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()
