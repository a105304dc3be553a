"""What to change if a run does not fit its GPU: each setting alone, then combinations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rlinf_core.costs.memory import usable
from rlinf_core.plan.step import Plan
from rlinf_core.plugins.registry import Plugins

MORE_RANKS = 4
"""Suggest at most this many times the ranks."""


@dataclass(frozen=True)
class Change:
    """A change of settings, and what the run would then take."""

    settings: str
    """In words: `trainer.activation_checkpointing = "full"`."""
    micro_batch: int
    """The largest that fits and divides a rank's share of the global batch; 0: none."""
    peak: float
    """Bytes on a rank with that micro batch, or with one sample if none fits."""
    costs: str
    """The disadvantage of the change."""


def advise(plan: Plan, plugins: Plugins, gpu_memory: float) -> list[Change]:
    """Changes that make a run fit the GPU, or come closer if none does; empty if it already fits.

    Args:
        plan: The run's plan.
        plugins: The loaded plugins.
        gpu_memory: Nominal memory in GB, 80 for an 80 GB GPU.
    """
    if plan.memory().total <= usable(gpu_memory, plan.sharding):
        return []
    found = []
    for changes, costs in _changes(plan):
        plan = plan.counting(changes, plugins)
        size = plan.largest_micro_batch(gpu_memory, **changes)
        found.append(Change(_words(changes, size), size, plan.memory(size or 1, **changes).total, costs))
    return [change for change in found if change.micro_batch] or found


def _changes(plan: Plan) -> Iterator[tuple[dict[str, Any], str]]:
    """Settings of `[trainer]` and their cost, cheapest first."""
    trainer = plan.trainer
    yield {}, "more micro batches per step"
    # Changes of what blocks keep build on compilation: it costs nothing after the first steps.
    compiled: dict[str, Any] = {}
    if plan.has_blocks and not plan.compiled and trainer.device != "cpu":
        compiled = {"compile": True}
        yield compiled, "slow first steps; later ones are faster"
    if not trainer.reshard_after_forward:
        yield {"reshard_after_forward": True}, "one more all-gather per micro batch"
    if plan.ranks > 1 and plan.share > 1 and not trainer.reduce_every_micro_batch:
        yield {"reduce_every_micro_batch": True}, "communicates gradients in each micro batch"
    if plan.sharding.num_replicas > 1:
        yield {"num_replicas": 1}, "gathers weights from all ranks"
    if plan.has_blocks and trainer.activation_checkpointing == "none":
        yield compiled | {"activation_checkpointing": "selective"}, "computes norms and activations twice"
    ema: dict[str, Any] = {"ema_device": "cpu"} if _has_ema_on_device(plan) else {}
    if ema:
        yield ema, "copies the weights to the CPU each step, which averages them there"
        if compiled:
            yield compiled | ema, "both"
    full: dict[str, Any] = {}
    if plan.has_blocks and trainer.activation_checkpointing != "full":
        full = {"activation_checkpointing": "full"}
        yield full, "a third more computation"
        if ema:
            yield full | ema, "both"
    ranks = plan.ranks
    while (ranks := ranks * 2) <= min(MORE_RANKS * plan.ranks, trainer.global_batch_size):
        if trainer.global_batch_size % ranks == 0:
            yield {"ranks": ranks}, "more GPUs"
    if not trainer.cpu_offload:
        offload = {**full, "cpu_offload": True, "ema_device": "auto"}
        yield offload, "optimizer on the CPU: much slower steps"


def _has_ema_on_device(plan: Plan) -> bool:
    return plan.states.ema > 0 and plan.trainer.ema_device != "cpu" and not plan.trainer.cpu_offload


def _words(changes: Mapping[str, Any], micro_batch: int) -> str:
    texts = [
        f"{value} ranks" if key == "ranks" else f"trainer.{key} = {_toml(value)}"
        for key, value in changes.items()
        if (key, value) != ("ema_device", "auto")
    ]
    return " with ".join([*texts, *([f"trainer.micro_batch_size = {micro_batch}"] if micro_batch else [])]) or "-"


def _toml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f'"{value}"' if isinstance(value, str) else str(value)
