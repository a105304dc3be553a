"""What plugins do with the gradients of a step before the optimizer uses them: the hook `rlinf_gradients_ready`.

Nothing here waits for the device: plugins' metrics are scalars on it, which travel to the host with the step's own. The
module needs only torch and NumPy, as `training.step` does.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor

from rlinf_core.contract.process_group import ProcessGroup
from rlinf_core.errors import PluginError, UserError
from rlinf_core.plugins.owners import Implementation
from rlinf_core.training.monitor.metrics import as_number, check_names

if TYPE_CHECKING:
    from rlinf_core.contract.run import LoadedPlugins, Trainer

HOOK = "rlinf_gradients_ready"


class GradientHooks:
    """Calls the plugins once per step, on every rank."""

    def __init__(
        self, trainer: Trainer, policy: Any, group: ProcessGroup, implementations: Sequence[Implementation]
    ) -> None:
        self._trainer, self._policy, self._group = trainer, policy, group
        self._implementations = implementations
        self._compared = False

    @classmethod
    def of(cls, trainer: Trainer, policy: Any, group: ProcessGroup, plugins: LoadedPlugins) -> GradientHooks | None:
        """The hooks of a run; None if no plugin implements one."""
        found = plugins.implementations(HOOK)
        return cls(trainer, policy, group, found) if found else None

    @torch.no_grad()
    def __call__(self, step: int, scale: torch.Tensor, taken: Collection[str]) -> dict[str, torch.Tensor]:
        """Let plugins read and change the gradients; returns their metrics, each [1], float32, on the group's device.

        Args:
            step: Number of the step, from 1.
            scale: Scalar; a stored gradient times this is the gradient of the step's mean loss.
            taken: Names of the step's other metrics.

        Raises:
            PluginError: A metric's name is taken, its value is not a scalar, or ranks returned different names.
        """
        scale = scale.to(next(self._policy.parameters()).device)  # Differs only if parameters are offloaded to the CPU.
        found: dict[str, torch.Tensor] = {}
        names: dict[str, list[str]] = {}
        for one in self._implementations:
            metrics = one.call(trainer=self._trainer, policy=self._policy, step=step, scale=scale)
            try:
                own = check_names(metrics, [*taken, *found])
                found |= {name: self._on_device(name, value) for name, value in own.items()}
            except UserError as error:
                raise PluginError(f"{error} [{one}]") from error
            names[str(one)] = sorted(own)
        if not self._compared:  # Once: later on it would make the host wait for other ranks in every step.
            self._compare(names)
        return {name: value.reshape(1) for name, value in whole(found).items()}

    def _on_device(self, name: str, value: Any) -> torch.Tensor:
        """A metric as a scalar in float32 on the group's device; a DTensor stays one."""
        if not isinstance(value, torch.Tensor):
            return torch.full((), as_number(name, value), device=self._group.device)
        if value.numel() != 1:
            raise UserError(f"the metric {name!r} must be a scalar, not a tensor of shape {list(value.shape)}")
        return value.detach().to(self._group.device, torch.float32).reshape(())

    def _compare(self, names: Mapping[str, list[str]]) -> None:
        """Check that every rank returned the same metrics: else their reductions would wait for ranks without them."""
        first, *others = self._group.gather(dict(names))
        for rank, other in enumerate(others, start=1):
            for one in first:
                if differing := sorted({*first[one]} ^ {*other[one]}):
                    has, lacks = (0, rank) if differing[0] in first[one] else (rank, 0)
                    raise PluginError(
                        f"every rank must return the same metrics, but {differing[0]!r} was returned on rank {has} and "
                        f"not on rank {lacks} [{one}]"
                    )
        self._compared = True


def whole(values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Plain scalars for plain scalars and DTensors; those of one mesh and placement are reduced in one collective.

    Args:
        values: The same names on every rank.
    """
    found = dict(values)
    together: defaultdict[Any, dict[str, DTensor]] = defaultdict(dict)
    for name, value in sorted(values.items()):  # Ranks reduce in one order.
        if isinstance(value, DTensor):
            together[value.device_mesh, value.placements][name] = value
    for (mesh, placements), group in together.items():
        stacked = torch.stack([value.to_local() for value in group.values()])
        found |= dict(zip(group, DTensor.from_local(stacked, mesh, placements).full_tensor(), strict=True))
    return found
