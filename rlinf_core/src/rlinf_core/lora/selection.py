"""Which of a policy's layers get adapters, and what is trained beside them. Imports no torch: `rlinf validate` counts.

A name here is one in published weights: of a module (`model.layers.0.self_attn.q_proj`), or of a parameter.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from rlinf_core.errors import UserError, did_you_mean
from rlinf_core.lora.config import RANK, LoraConfig

LISTED = 8
"""Maximum number of names that a message lists."""
_PATTERN = re.compile(r"[\\^$*+?|()\[\]{}]")
"""What only a regular expression contains."""


class Named(Protocol):
    """What the selection needs to know of a policy; `contract.policy_options.Adapted` describes each member."""

    @property
    def lora_targets(self) -> tuple[str, ...]:
        """Layers with adapters if `targets` is not set."""
        ...

    @property
    def lora_modules(self) -> tuple[str, ...]:
        """Modules that are trained whole if `modules_to_save` is not set."""
        ...

    def lora_groups(self, name: str) -> Collection[str]:
        """The groups that a published module belongs to."""
        ...


class Change(NamedTuple):
    """The size of an adapter."""

    rank: int
    scale: float


@dataclass(frozen=True)
class Selection:
    """What is trained."""

    adapters: Mapping[str, Change]
    """Published module -> its adapter."""
    whole: frozenset[str]
    """Published names of the parameters that are trained whole."""


def select(lora: LoraConfig, policy: Named, matrices: Collection[str], parameters: Collection[str]) -> Selection:
    """Apply the expressions of `[policy.lora]` to a policy's names.

    Args:
        lora: The table.
        policy: The policy's config.
        matrices: Modules that can have adapters.
        parameters: All parameters.

    Raises:
        UserError: An expression matches nothing.
    """
    problems: list[str] = []
    names = _Names({name: frozenset(policy.lora_groups(name)) for name in matrices}, "targets", problems)
    ranks = {one: names.matching(one, "rank_pattern") for one in lora.rank_pattern}
    alphas = {one: names.matching(one, "alpha_pattern") for one in lora.alpha_pattern}
    chosen = set[str]()
    for one in policy.lora_targets if lora.targets is None else lora.targets:
        chosen |= names.matching(one, "targets")
    try:
        whole = select_whole(lora, policy, parameters)
    except UserError as error:
        problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))
    chosen -= {name.rpartition(".")[0] for name in whole}
    adapters = {}
    for name in (one for one in matrices if one in chosen):
        otherwise = RANK if lora.rank is None else lora.rank
        rank = next((lora.rank_pattern[one] for one, found in ranks.items() if name in found), otherwise)
        alpha = next((lora.alpha_pattern[one] for one, found in alphas.items() if name in found), lora.alpha)
        if rank:
            adapters[name] = Change(rank, lora.scale_of(rank, alpha))
    return Selection(adapters, whole)


def select_whole(lora: LoraConfig, policy: Named, parameters: Collection[str]) -> frozenset[str]:
    """The published parameters that are trained whole; raises `UserError` if an expression matches nothing."""
    problems: list[str] = []
    modules = {name: name.rpartition(".")[0] for name in parameters}
    groups = {name: frozenset(policy.lora_groups(name)) for name in modules.values()}
    names = _Names(groups, "modules_to_save", problems, below=True)
    inside = set[str]()
    for one in policy.lora_modules if lora.modules_to_save is None else lora.modules_to_save:
        inside |= names.matching(one, "modules_to_save")
    if problems:
        raise UserError("\n".join(problems))
    return frozenset(name for name in parameters if modules[name] in inside)


@dataclass(frozen=True)
class _Names:
    """Modules that expressions are matched with."""

    groups: Mapping[str, frozenset[str]]
    """Module -> its groups."""
    what: str
    problems: list[str]
    """Gets a sentence for each expression that matches nothing."""
    below: bool = False
    """Whether the name of a module also means those inside of it."""

    def matching(self, expression: str, key: str) -> set[str]:
        """The modules that an expression in a key of the table matches."""
        known = frozenset[str]().union(*self.groups.values())
        found = {name for name, own in self.groups.items() if matches(expression, name, own, known, below=self.below)}
        if not found:
            self.problems.append(_nothing(expression, key, self.groups, known))
        return found


def module_groups(name: str) -> frozenset[str]:
    """`attention` or `mlp`, by words that the names of most architectures contain."""
    words = {
        "attention": ("attn", "attention", "self_attn"),
        "mlp": ("mlp", "feed_forward", "feedforward", "ffn", "ff", "block_sparse_moe"),
    }
    parts = name.split(".")
    return frozenset(group for group, known in words.items() if any(part in known for part in parts))


def matches(
    expression: str, name: str, groups: Collection[str], known: Collection[str], *, below: bool = False
) -> bool:
    """Whether an expression of `[policy.lora]` matches a published module.

    Args:
        expression: Groups joined by dots, the end of a name, or a regular expression for the whole name.
        name: The module.
        groups: The groups that it belongs to.
        known: All groups of the policy.
        below: Whether an expression that is a name also matches the modules inside of the one it names.
    """
    if _PATTERN.search(expression):
        try:
            return re.fullmatch(expression, name) is not None
        except re.error as error:
            raise UserError(f"policy.lora: {expression!r} is not a regular expression: {error}") from error
    parts = expression.split(".")
    if all(part in known for part in parts):
        return all(part in groups for part in parts)
    return f".{name}".endswith(f".{expression}") or (below and f".{expression}." in f".{name}.")


def _nothing(expression: str, key: str, names: Collection[str], known: Collection[str]) -> str:
    ends = sorted({name.rpartition(".")[2] for name in names})
    there = sorted(known)
    listed = ", ".join(ends[:LISTED]) + f" and {len(ends) - LISTED} more" * (len(ends) > LISTED)
    return (
        f"policy.lora.{key}: {expression!r} matches no layer of the policy{did_you_mean(expression, [*there, *ends])}; "
        f"groups are {', '.join(there) or 'none'}, names end in {listed or 'nothing'}"
    )


def describe(lora: LoraConfig, selection: Selection, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """What is trained and what is not, in numbers.

    Args:
        lora: The table.
        selection: What is trained.
        shapes: All published parameters -> shapes.
    """
    sizes = [change.rank * sum(shapes[f"{name}.weight"]) for name, change in selection.adapters.items()]
    ranks = [change.rank for change in selection.adapters.values()]
    return f"{numbers(sum(sizes), len(sizes), ranks, selection.whole, shapes)}, held in {lora.base_dtype}"


def numbers(
    adapters: int, matrices: int, ranks: Collection[int], whole: Collection[str], shapes: Mapping[str, tuple[int, ...]]
) -> str:
    """Counts of what trains, in words.

    Args:
        adapters: Numbers in adapters.
        matrices: How many matrices have one.
        ranks: Their ranks.
        whole: Published parameters that are trained whole.
        shapes: All published parameters -> shapes.
    """
    beside = sum(math.prod(shapes[name]) for name in whole)
    frozen = sum(map(math.prod, shapes.values())) - beside
    trained = adapters + beside
    listed = ", ".join(map(str, sorted(set(ranks)))) or "0"
    parts = [f"{adapters:,} in adapters of {matrices} matrices (rank {listed})"]
    if whole:
        parts.append(f"{beside:,} of {_listed(sorted({name.rpartition('.')[0] for name in whole}))} trained whole")
    share = 100 * trained / (trained + frozen)
    total = trained + frozen
    return f"{trained:,} of {total:,} numbers train ({share:.2g} %): {' and '.join(parts)}; {frozen:,} are frozen"


def _listed(names: list[str]) -> str:
    shown = [name.rpartition(".")[2] for name in names[:LISTED]]
    return ", ".join(shown) + f" and {len(names) - LISTED} more modules" * (len(names) > LISTED)
