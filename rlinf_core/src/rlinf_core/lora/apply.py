"""Freeze a policy and put adapters into its layers, as `[policy.lora]` says; on the meta device, before sharding."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from rlinf_core.errors import UserError
from rlinf_core.lora.config import LoraConfig
from rlinf_core.lora.files import AdapterFiles, selected
from rlinf_core.lora.layers import LoraLinear, Slice
from rlinf_core.lora.selection import Named, Selection


class Published(Named, Protocol):
    """A policy's config: what its parameters are called."""

    def published_name(self, name: str) -> str:
        """The name of a parameter in published weights."""
        ...

    def published_parts(self, name: str) -> Mapping[str, int]:
        """The published tensors that a parameter stacks -> rows."""
        ...


class Rows(NamedTuple):
    """Rows of a parameter that are a published one."""

    parameter: str
    """The parameter's own name."""
    first: int
    shape: tuple[int, ...]


def add_lora(policy: nn.Module, config: Published, lora: LoraConfig) -> None:
    """Freeze all parameters but those trained whole, and replace layers by ones with adapters.

    Raises:
        UserError: An expression of the table matches nothing or only a part of a merged matrix, or the adapters in
            `lora.weights` do not fit the policy.
    """
    rows = published_rows(policy, config)
    idle = idle_parameters(policy)
    # Adapters from elsewhere may also change layers that no loss reaches here.
    layers = linear_layers(policy, frozenset() if lora.weights else idle)
    matrices = [name.removesuffix(".weight") for name, one in rows.items() if one.parameter in layers]
    files = AdapterFiles.open(lora.weights) if lora.weights else None
    selection = selected(lora, config, matrices, {name: one.shape for name, one in rows.items()})
    freeze(policy, trained_whole(selection.whole, rows))
    slices: dict[str, list[Slice]] = {}
    for module, slice_ in _slices(selection, rows, files):
        slices.setdefault(module, []).append(slice_)
    for parameter, parts in slices.items():
        name = parameter.removesuffix(".weight")
        ordered = sorted(parts, key=lambda part: part.first)
        adapted = LoraLinear(layers[parameter], ordered, lora.dropout)
        adapted.kept_for_export = parameter in idle
        policy.set_submodule(name, adapted)
    hold_frozen(policy, lora.base_dtype)


def published_rows(policy: nn.Module, config: Published) -> dict[str, Rows]:
    """Published parameter -> where it is in a policy."""
    out = {}
    for name, parameter in policy.named_parameters():
        first, shape = 0, tuple(parameter.shape)
        for published, rows in (config.published_parts(name) or {config.published_name(name): len(parameter)}).items():
            out[published] = Rows(name, first, (rows, *shape[1:]))
            first += rows
    return out


def idle_parameters(policy: Any) -> frozenset[str]:
    """Names of the parameters that no loss reaches."""
    idle = {id(p) for unit in policy.shard_units() if not unit.reached for p in unit.module.parameters()}
    return frozenset(name for name, parameter in policy.named_parameters() if id(parameter) in idle)


def linear_layers(policy: Any, without: Collection[str]) -> dict[str, nn.Linear]:
    """Weight -> linear layer, without some weights."""
    return {
        f"{name}.weight": module
        for name, module in policy.named_modules()
        if isinstance(module, nn.Linear)
        and type(module).forward is nn.Linear.forward
        and f"{name}.weight" not in without
    }


def trained_whole(published: Collection[str], rows: Mapping[str, Rows]) -> set[str]:
    """The parameters that hold these published ones.

    Raises:
        UserError: One holds others as well.
    """
    own = {rows[name].parameter for name in published}
    if other := [name for name, one in rows.items() if one.parameter in own and name not in published]:
        with_it = [name for name in published if rows[name].parameter == rows[other[0]].parameter]
        raise UserError(
            f"policy.lora.modules_to_save: {with_it[0]} and {other[0]} are one matrix here, and train whole together "
            "or not at all: name both, or give them adapters"
        )
    return own


def freeze(policy: nn.Module, trained: Collection[str]) -> None:
    """Let only these parameters require a gradient; those that the policy itself has frozen stay so."""
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and name in trained)


def hold_frozen(policy: Any, base_dtype: str) -> None:
    """Hold frozen weights in bfloat16, except those that are computed in float32 whatever the compute dtype."""
    if base_dtype == "fp32":
        return
    units = list(policy.shard_units())
    wide = {id(p) for unit in units if unit.dtype == "fp32" for p in unit.module.parameters()}
    for unit in units:
        for parameter in unit.module.parameters() if unit.dtype == "compute" else ():
            if not parameter.requires_grad and id(parameter) not in wide:
                parameter.data = parameter.data.to(torch.bfloat16)


def _slices(selection: Selection, rows: Mapping[str, Rows], files: AdapterFiles | None) -> Iterator[tuple[str, Slice]]:
    """The parameter that each adapter changes, and the rows of it."""
    pairs = files.pairs(selection.adapters) if files else {}
    for module, change in selection.adapters.items():
        where = rows[f"{module}.weight"]
        start = None
        if files is not None:
            a, b = pairs[module]["A"], pairs[module]["B"]
            start = (partial(files.read, a.key), partial(files.read, b.key))
        yield where.parameter, Slice(module, where.first, where.shape[0], change.rank, change.scale, start)


class WithTrainedModules:
    """Weights in which the modules that were trained whole beside adapters have their trained values.

    Args:
        weights: The base weights, a `WeightSource`.
        files: The adapters.
        policy: The policy's config.
    """

    def __init__(self, weights: Any, files: AdapterFiles, policy: Published) -> None:
        self._weights, self._files, self._policy = weights, files, policy

    def tensor(self, name: str) -> torch.Tensor:
        """See `WeightSource`."""
        parts = list(self._policy.published_parts(name)) or [self._policy.published_name(name)]
        stored = self._files.whole(parts)
        if not stored:
            tensor: torch.Tensor = self._weights.tensor(name)
            return tensor
        return torch.cat([self._files.read(stored[part].key).float() for part in parts])

    def file_of(self, name: str) -> str:
        """See `LocatedWeights`."""
        located = getattr(self._weights, "file_of", None)
        return located(name) if located else ""

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """See `WeightSource`."""
        self._weights.check(shapes)
