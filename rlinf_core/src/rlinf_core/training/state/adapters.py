"""The parameters that plugins add to a policy (`contract.adapter`): found, given their first values, merged.

In reading order: what a policy has before plugins change it, what they have added, and merging for an export.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rlinf_core.contract.adapter import Adapter, BufferedAdapter, MergeableAdapter
from rlinf_core.errors import UserError
from rlinf_core.training.state.fsdp import derived_seed, unused_parameters

LISTED = 4
"""Maximum number of names that a message lists."""
HOW = "see `Adapters` in docs/weights.md"
UNUSED = (
    "A policy that multiplies with a layer's weight itself, instead of calling the layer, does not notice that another "
    f"module has taken its place: leave out this layer; {HOW}"
)
"""Why the loss may not depend on an adapter."""


@dataclass(frozen=True)
class Original:
    """A policy's parameters and buffers as its config builds it."""

    parameters: Mapping[str, nn.Parameter]
    trained: frozenset[str]
    """Names of those that require a gradient."""
    buffers: frozenset[str]

    @classmethod
    def of(cls, policy: nn.Module) -> Original:
        """What a policy has now."""
        return cls(dict(policy.named_parameters()), _trained(policy), frozenset(dict(policy.named_buffers())))


@dataclass(frozen=True, eq=False)
class Adapters:
    """What plugins have added to a policy."""

    modules: Mapping[str, Any]
    """Name in the policy -> adapter, each with at least one added parameter."""
    owners: Mapping[str, str]
    """Added parameter -> name of its adapter."""
    classes: Mapping[str, str]
    """Name of an adapter -> its class, with the package; sharding changes the class of a module."""
    buffered: tuple[Any, ...]
    """Modules that must rebuild buffers."""
    changed: bool
    """Whether plugins have changed which parameters there are or which of them train."""

    def without_added(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Only the policy's own parameters, which pretrained weights have."""
        return {name: shape for name, shape in shapes.items() if name not in self.owners}

    def initial_value(self, seed: int, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The initial value of an added parameter; raises `UserError` if its adapter gives another shape."""
        owner = self.owners[name]
        generator = torch.Generator().manual_seed(derived_seed(seed, name))
        value: torch.Tensor = self.modules[owner].initial_value(name.removeprefix(f"{owner}."), shape, generator)
        if tuple(value.shape) != shape:
            raise UserError(
                f"initial_value() of the adapter {owner!r} ({self.classes[owner]}) gives {name} the shape "
                f"{list(value.shape)}, but the parameter has {list(shape)}"
            )
        return value

    def gradient_warnings(self, trained: Mapping[str, nn.Parameter]) -> list[str]:
        """Which adapters got no gradient at all in a step, one sentence; call it before gradients are cleared.

        Args:
            trained: Parameters with optimizer state.
        """
        expected = {owner for name, owner in self.owners.items() if name in trained}
        reached = {owner for name, owner in self.owners.items() if name in trained and trained[name].grad is not None}
        if not (idle := [name for name in self.modules if name in expected - reached]):
            return []
        described = _listed([f"{name} ({self.classes[name]})" for name in idle])
        return [f"warning: in its first step the run gave no gradient to the adapters {described}. {UNUSED}"]

    def rebuild_buffers(self) -> None:
        """Fill the buffers that plugins have added; the module has real memory."""
        for module in self.buffered:
            module.rebuild_buffers()

    def recorded(self) -> dict[str, int]:
        """Class -> number of parameters that its adapters add; checkpoints record it."""
        return dict(sorted(Counter(self.classes[owner] for owner in self.owners.values()).items()))

    def facts(self, policy: nn.Module) -> list[str]:
        """What a user should know before training, one sentence each; empty without adapters."""
        if not self.modules:
            return []
        parameters = dict(policy.named_parameters())
        added = sum(parameters[name].numel() for name in self.owners)
        trained = sum(p.numel() for p in parameters.values() if p.requires_grad)
        total = sum(p.numel() for p in parameters.values())
        facts = [f"adapters: {self._counted(self.modules)} add {added:,} numbers; {trained:,} of {total:,} train"]
        if stuck := [name for name, module in self.modules.items() if not isinstance(module, MergeableAdapter)]:
            facts.append(
                f"warning: `rlinf export` will refuse this run: {self._counted(stuck)} cannot be merged into the "
                f"policy's own weights ({HOW})"
            )
        kept = {name for name, owner in self.owners.items() if getattr(self.modules[owner], "kept_for_export", False)}
        if idle := unused_parameters(policy) & self.owners.keys() - kept:
            facts.append(
                f"warning: no loss reaches {_listed(sorted(idle))}: adapters of modules that are kept only for export "
                "learn nothing"
            )
        for name, module in self.modules.items():
            if user := next(filter(None, (_user_outside(policy, name, p) for p in module.parameters())), ""):
                facts.append(
                    f"warning: {user} uses a parameter of the module that the adapter {name} ({self.classes[name]}) "
                    "takes the place of: `rlinf export` will refuse this run if merging changes it"
                )
        return facts

    def _counted(self, names: Any) -> str:
        counts = Counter(self.classes[name] for name in names)
        return ", ".join(f"{count} of {name}" for name, count in sorted(counts.items()))


def find_adapters(before: Original, policy: nn.Module, plugins: Callable[[], str]) -> Adapters:
    """Find what plugins have added to a policy, and who answers for it.

    Args:
        before: The policy before they changed it.
        policy: The policy now.
        plugins: The plugins that may have done it, for messages.

    Raises:
        UserError: A parameter has another name than before, an added parameter or buffer has nobody to fill it, or
            nothing is left to train.
    """
    now = dict(policy.named_parameters())
    _refuse_renamed(before, now, plugins)
    owners = {name: _above(policy, name, Adapter) for name in now if name not in before.parameters}
    if orphans := [name for name, owner in owners.items() if not owner]:
        raise UserError(
            f"rlinf_policy_built of {plugins()} adds parameters without an initial value: {_listed(orphans)}. Neither "
            "the policy nor its pretrained weights know them: the module that holds them, or one around it, needs a "
            f"method initial_value(name, shape, generator); {HOW}"
        )
    buffers = {n: _above(policy, n, BufferedAdapter) for n, _ in policy.named_buffers() if n not in before.buffers}
    if unfilled := [name for name, owner in buffers.items() if not owner]:
        raise UserError(
            f"rlinf_policy_built of {plugins()} adds buffers that nobody fills: {_listed(unfilled)}. The adapter that "
            f"holds them needs a method rebuild_buffers(); {HOW}"
        )
    trained = _trained(policy)
    if before.trained and not trained:
        raise UserError(
            f"rlinf_policy_built of {plugins()} freezes every parameter of the policy: nothing is left to train"
        )
    if narrow := [n for n in now if now[n].requires_grad and now[n].dtype != torch.float32]:
        by = f"rlinf_policy_built of {named}" if (named := plugins()) else "the policy"
        dtypes = ", ".join(sorted({str(now[name].dtype).removeprefix("torch.") for name in narrow}))
        raise UserError(
            f"{by} trains parameters in {dtypes}: {_listed(narrow)}. Only frozen parameters may have another dtype "
            "than float32: in a narrower one, small updates would be rounded away"
        )
    modules = {name: policy.get_submodule(name) for name in dict.fromkeys(owners.values())}
    return Adapters(
        modules=modules,
        owners=owners,
        classes={name: f"{type(module).__module__}.{type(module).__qualname__}" for name, module in modules.items()},
        buffered=tuple(policy.get_submodule(name) for name in dict.fromkeys(buffers.values())),
        changed=now.keys() != before.parameters.keys() or trained != before.trained,
    )


def _refuse_renamed(before: Original, now: Mapping[str, nn.Parameter], plugins: Callable[[], str]) -> None:
    names = {parameter: name for name, parameter in now.items() if name not in before.parameters}
    moved = {name: names[p] for name, p in before.parameters.items() if name not in now and p in names}
    if moved:
        old, new = next(iter(moved.items()))
        raise UserError(
            f"rlinf_policy_built of {plugins()} renames parameters of the policy: {old} is {new} now"
            f"{f', and {len(moved) - 1} more' * (len(moved) > 1)}. Pretrained weights, initial values and checkpoints "
            "find them by name: let the module that takes the place of a layer hold the layer's parameters itself, as "
            f"self.weight = layer.weight, instead of the layer; {HOW}"
        )


def _above(policy: nn.Module, name: str, kind: type) -> str:
    """The innermost module below the policy that holds a parameter or buffer and is of a kind; empty if none is."""
    path = name.rpartition(".")[0]
    while path and not isinstance(policy.get_submodule(path), kind):
        path = path.rpartition(".")[0]
    return path


def _trained(policy: nn.Module) -> frozenset[str]:
    return frozenset(name for name, parameter in policy.named_parameters() if parameter.requires_grad)


class Merge:
    """Expresses a policy's adapters in its own parameters, adapter by adapter.

    Args:
        policy: The policy with its adapters, on any device.
        adapters: What plugins have added to it.

    Raises:
        UserError: An adapter cannot be merged.
    """

    def __init__(self, policy: nn.Module, adapters: Adapters) -> None:
        self._policy, self._adapters = policy, adapters
        self._names = {parameter: name for name, parameter in policy.named_parameters()}
        if stuck := [name for name, module in adapters.modules.items() if not isinstance(module, MergeableAdapter)]:
            raise UserError(
                f"the run's adapters cannot be merged into the policy's own weights: {self._described(stuck)}. Without "
                "them the exported policy would lose what they have learned. Give the class a method merged(tensors), "
                f"which returns nothing if actions do not depend on the adapter; {HOW}"
            )
        self.merged: list[str] = []
        """Adapters that have changed weights."""
        self.left_out: list[str] = []
        """Adapters without which the policy acts the same, by their own account."""

    def groups(self) -> Iterator[tuple[str, dict[str, torch.Size]]]:
        """What has to be in memory at once: the name of an outermost adapter, or an empty one, and parameters."""
        inside: set[str] = set()
        outermost = [name for name in self._adapters.modules if not self._inside_another(name)]
        groups = {}
        for name in outermost:
            parameters = self._policy.get_submodule(name).named_parameters()
            groups[name] = {self._names[parameter]: parameter.shape for _, parameter in parameters}
            inside |= groups[name].keys()
        for parameter, name in self._names.items():
            if name not in inside and name not in self._adapters.owners:
                yield "", {name: parameter.shape}
        yield from groups.items()

    def __call__(self, outermost: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The policy's own parameters of a group.

        Args:
            outermost: The group's adapter, or empty.
            tensors: The group's parameters: whole, float32, on the CPU.

        Raises:
            UserError: An adapter returns something else than the policy's own parameters, or one that others use.
        """
        out = dict(tensors)
        inner = [name for name in self._adapters.modules if outermost and f"{name}.".startswith(f"{outermost}.")]
        for name in sorted(inner, key=lambda name: -name.count(".")):
            out |= self._merge(name, out)
        return {name: tensor for name, tensor in out.items() if name not in self._adapters.owners}

    def _merge(self, adapter: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        module = self._adapters.modules[adapter]
        parameters = dict(module.named_parameters(remove_duplicate=False))
        with torch.no_grad():
            given = {name: tensors[self._names[parameter]] for name, parameter in parameters.items()}
            results = module.merged(given)
        own = {name for name, parameter in parameters.items() if self._names[parameter] not in self._adapters.owners}
        for name, tensor in results.items():
            if name not in own:
                raise self._wrong(adapter, f"{name!r}, which the policy does not have", own)
            if tensor.shape != parameters[name].shape:
                shapes = f"{list(tensor.shape)} instead of {list(parameters[name].shape)}"
                raise self._wrong(adapter, f"{name!r} with the shape {shapes}", own)
            if user := _user_outside(self._policy, adapter, parameters[name]):
                raise UserError(
                    f"the adapter {self._described([adapter])} cannot be merged: {user} uses the same parameter as its "
                    f"{name!r} and would change with it. Tied weights need one adapter for all that use them"
                )
        (self.merged if results else self.left_out).append(adapter)
        return {self._names[parameters[name]]: tensor.float() for name, tensor in results.items()}

    def _wrong(self, adapter: str, what: str, own: set[str]) -> UserError:
        return UserError(
            f"merged() of the adapter {self._described([adapter])} returns {what}: it may return new values of "
            f"{', '.join(sorted(own)) or 'nothing, as it holds none of the parameters of the policy'}"
        )

    def _inside_another(self, name: str) -> bool:
        return any(name != one and name.startswith(f"{one}.") for one in self._adapters.modules)

    def _described(self, names: list[str]) -> str:
        return _listed([f"{name} ({self._adapters.classes[name]})" for name in names])

    def notes(self) -> list[str]:
        """What was merged and left out, one sentence each."""
        return [
            f"{len(names)} adapter{'s' * (len(names) > 1)} {what}: {self._described(names)}"
            for names, what in (
                (self.merged, "merged into the weights"),
                (self.left_out, "not exported, because the policy acts the same without"),
            )
            if names
        ]


def _user_outside(policy: nn.Module, adapter: str, parameter: nn.Parameter) -> str:
    """A name that a parameter of the policy has outside of an adapter; empty if there is none."""
    every = policy.named_parameters(remove_duplicate=False)
    return next((name for name, one in every if one is parameter and not name.startswith(f"{adapter}.")), "")


def _listed(names: list[str]) -> str:
    return ", ".join(names[:LISTED]) + f" and {len(names) - LISTED} more" * (len(names) > LISTED)
