"""How a policy was trained, for its model card: steps, batch, learning rate, hardware, versions, and the config.

Tables that describe a cluster, a tracker's account or folders stay out: they name machines and people.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

from rlinf_core.config.toml import write_toml
from rlinf_core.contract.run import RunConfig
from rlinf_core.loggers.jsonl import METRICS_FILE, read_metrics
from rlinf_core.publish.exported import Exported
from rlinf_core.untrusted.text import read_json

LEFT_OUT = ("cluster", "loggers", "plugins")
"""Tables of the config that a model card leaves out."""
FOLDERS = ("output_dir", "checkpoint_dir")
"""Keys of `[runner]` that a model card leaves out."""

MOST_OF_A_PATH = 1000
"""Longer texts are no paths: asking for them raises an error."""


def recipe_rows(exported: Exported) -> dict[str, str]:
    """The recipe in a few lines: what -> value."""
    run, trainer, optim = exported.run, exported.run.trainer, exported.run.optim
    environment = _environment(exported.folder)
    rows = {
        "policy": f"`{run.policy.type}`",
        "steps": f"{exported.step:,} of {run.runner.max_steps:,}" if run.runner.max_steps else f"{exported.step:,}",
        "batch": f"{trainer.global_batch_size} samples per step",
        "training rows": f"{exported.rows:,}",
        "samples seen": f"{exported.step * trainer.global_batch_size:,}",
        "optimizer": f"{optim.type}, schedule {optim.schedule}, largest learning rate {optim.lr:g}",
        "trained": _trained(run),
        "seed": f"{run.seed}",
    }
    if (loss := _last_loss(exported)) is not None:
        rows["training loss"] = f"{loss:.4g} in the last step before the checkpoint"
    if environment:
        devices, ranks = environment.get("device", "unknown"), environment.get("ranks", 1)
        rows["hardware"] = "CPU" if devices == "cpu" else f"{ranks} x {devices}"
        if devices == "cpu" and ranks != 1:
            rows["hardware"] = f"CPU, {ranks} processes"
        rows["commit"] = f"`{environment['commit']}`" if environment.get("commit") else ""
        versions = environment.get("versions")
        if isinstance(versions, Mapping):
            used = packages_of(exported)
            kept = {name: one for name, one in versions.items() if name in used or not name.startswith("rlinf-")}
            rows["versions"] = ", ".join(f"{name} {version}" for name, version in kept.items())
    return {key: value for key, value in rows.items() if value}


def packages_of(exported: Exported) -> list[str]:
    """The distributions that the policy and its datasets come from, core first."""
    owners = packages_distributions()
    classes = [type(exported.run.policy), *(type(source.data) for source in exported.sources)]
    modules = [cls.__module__.partition(".")[0] for cls in classes]
    return list(dict.fromkeys(["rlinf-core", *(owners.get(name, [name.replace("_", "-")])[0] for name in modules)]))


def config_text(run: RunConfig) -> str:
    """The config as TOML, without what names machines, folders and people."""
    table: dict[str, Any] = run.model_dump(mode="json", exclude_none=True, round_trip=True)
    for name in LEFT_OUT:
        table.pop(name, None)
    for name in FOLDERS:
        table["runner"].pop(name, None)
    return write_toml(_without_paths(table))


def _without_paths(value: Any) -> Any:
    """Values in which a path is only its last part."""
    if isinstance(value, Mapping):
        return {key: _without_paths(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_without_paths(one) for one in value]
    if isinstance(value, str) and (
        value.startswith(("/", "~", "./", "../")) or ("/" in value and Path(value).exists())
    ):
        return f"…/{Path(value).name}"
    return value


def _trained(run: RunConfig) -> str:
    if run.policy.lora is not None:
        return "low-rank adapters (LoRA)"
    frozen = getattr(run.policy, "freeze", None)
    return f"all parameters, except `freeze = {frozen}`" if frozen and frozen != "nothing" else "all parameters"


def _last_loss(exported: Exported) -> float | None:
    losses = [
        row["loss"]
        for row in read_metrics(exported.folder / METRICS_FILE)
        if row["step"] is not None and row["step"] <= exported.step and row.get("loss") is not None
    ]
    return losses[-1] if losses else None


def _environment(folder: Path) -> Mapping[str, Any]:
    try:
        found = read_json(folder / "environment.json")
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
