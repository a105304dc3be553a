"""What an exported folder says of its policy: everything but the weights, which `rlinf_core.inference` loads."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ValidationError

from rlinf_core.contract.datasets import DatasetConfig
from rlinf_core.contract.policy import PolicyConfig
from rlinf_core.contract.registered import PLUGINS
from rlinf_core.contract.run import no_source
from rlinf_core.contract.tables.mixture import MixtureShare
from rlinf_core.contract.weights.origin import DESCRIPTION, STATISTICS
from rlinf_core.data.coverage import Coverage, parse_coverage
from rlinf_core.data.normalize import load_norm_stats
from rlinf_core.data.pipeline import Pipeline, build_pipeline
from rlinf_core.data.sample import Sample
from rlinf_core.data.transforms import Transform
from rlinf_core.errors import UserError
from rlinf_core.export import ADAPTERS, FORMAT
from rlinf_core.plugins.registry import Plugins
from rlinf_core.untrusted.text import path_inside, read_json

ELSEWHERE = {
    "a policy in lerobot's format": "policy_preprocessor.json",
    "a policy in openpi's format": "assets/**/norm_stats.json",
    "weights alone": "*.safetensors*",
}
"""What a folder without `rlinf.json` may contain -> a file that identifies it."""


@dataclass(frozen=True)
class CheckTrainingState(Transform):
    """Check that a state is finite and has the width of the training data; changes nothing."""

    width: int

    def __call__(self, sample: Sample) -> Sample:
        """Return the sample unchanged."""
        state = sample.get("state")
        if state is not None and state.shape != (self.width,):
            raise UserError(
                f"the state of the observation has shape {list(state.shape)} after the dataset's transforms, in "
                f"training it was [{self.width}]: provide as many numbers as a row of the dataset has"
            )
        if state is not None and not np.isfinite(state).all():
            raise UserError("the state of the observation contains NaN or infinity: a robot must not act on that")
        return sample


@dataclass(frozen=True)
class Exported:
    """An exported folder, opened."""

    config: PolicyConfig
    """The policy; its weights are the folder's, or those that adapters belong to."""
    data: DatasetConfig
    pipeline: Pipeline
    coverage: Coverage | None
    """What training saw; None if the folder was exported before that was recorded."""
    adapters: dict[str, Any] | None
    """What the description says of adapters; None if the folder holds a whole policy."""
    description: dict[str, Any]
    """`rlinf.json`."""


def open_exported(folder: Path, plugins: Plugins, *, source: str = "", base: str | Path = "") -> Exported:
    """Open a folder that `rlinf export` wrote.

    Args:
        folder: The folder.
        plugins: Plugins that provide its classes.
        source: For a mixture, the name of a dataset.
        base: For adapters, the weights that they belong to, if they are not where the run had them.

    Raises:
        UserError: It is no such folder, or its files are inconsistent.
    """
    description = _read_description(folder)
    table, statistics = _choose_source(description["data"], folder, source)
    data = _validated(plugins.dataset(_name(table, "config_name", folder)), table, folder, plugins)
    here: dict[str, Any] = {field: str(_inside(folder, name)) for field, name in description["files"].items()}
    adapters = _described_adapters(description, folder, given=bool(base))
    if adapters is None:
        here["weights"] = str(folder)
    else:
        here["weights"] = str(base or adapters["base"])
        here["lora"] = {"weights": str(folder), "base_dtype": adapters["base_dtype"]}
    config = _validated(
        plugins.policy(_name(description["policy"], "type", folder)), description["policy"] | here, folder, plugins
    )
    stats = load_norm_stats(statistics) if statistics.exists() else None
    pipeline = build_pipeline(data, config, stats)
    if pipeline.normalize and stats and "state" in stats:  # A narrower state would be padded silently.
        pipeline = replace(pipeline, dataset=(*pipeline.dataset, CheckTrainingState(len(stats["state"].mean))))
    coverage = parse_coverage(description.get("coverage"), source, str(folder / DESCRIPTION))
    return Exported(config, data, pipeline, coverage, adapters, description)


def _described_adapters(description: dict[str, Any], folder: Path, *, given: bool) -> dict[str, Any] | None:
    """What the description says of adapters; None if the folder holds a whole policy."""
    table = description.get(ADAPTERS)
    if table is None:
        if given:
            raise UserError(f"load_policy(base=...): {folder} holds a whole policy, not adapters: leave base out")
        return None
    keys = ("base", "digest", "base_dtype")
    if not isinstance(table, dict) or not all(isinstance(table.get(key), str) for key in keys):
        raise UserError(f"{folder / DESCRIPTION}: {ADAPTERS} must be a table with {', '.join(keys)}")
    return table


def _choose_source(table: dict[str, Any], folder: Path, name: str) -> tuple[dict[str, Any], Path]:
    """The table of the chosen dataset, and the path of its statistics."""
    listed = table.get("mixture", [])
    if not isinstance(listed, list) or not all(isinstance(entry, dict) for entry in listed):
        raise UserError(f"{folder / DESCRIPTION}: its data.mixture is not a list of tables")
    entries = {_name(entry, "name", folder): entry for entry in listed}
    if not entries and not name:
        return table, folder / STATISTICS
    if not name and len(entries) == 1:
        (name,) = entries
    if name not in entries:
        raise UserError(f"{folder}: {no_source(name, list(entries), 'in load_policy(..., source=...)')}")
    own = {key: value for key, value in entries[name].items() if key not in MixtureShare.model_fields}
    return own, _inside(folder, f"norm_stats/{name}.json")


def _name(table: dict[str, Any], key: str, folder: Path) -> str:
    """A name in a table of the description."""
    if not isinstance(name := table.get(key), str):
        raise UserError(f"{folder / DESCRIPTION}: {key} is {name!r}, but must be a name")
    return name


def _inside(folder: Path, name: object) -> Path:
    """A file in the folder, by its name in the description."""
    try:
        return path_inside(folder, name)
    except ValueError as error:
        raise UserError(f"{folder / DESCRIPTION}: {error}") from error


def _read_description(folder: Path) -> dict[str, Any]:
    path = folder / DESCRIPTION
    if folder.is_dir() and not path.exists() and (what := _without_description(folder)):
        raise UserError(f"{folder} contains {what}")
    try:
        description: dict[str, Any] = read_json(path)
        if description["format"] != FORMAT:
            raise UserError(f"{path} has format {description['format']}, but this version reads format {FORMAT}")
        missing = [key for key in ("policy", "data", "files") if not isinstance(description[key], dict)]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} cannot be read ({error}): is this a folder that `rlinf export` wrote?") from error
    if missing:
        raise UserError(f"{path}: {', '.join(missing)} must be tables")
    return description


def _without_description(folder: Path) -> str:
    """What a folder without `rlinf.json` contains, and the way out; empty if unknown."""
    if (folder / "checkpoints").is_dir():
        return f"a run, not a policy: export it with `rlinf export {folder} --output FOLDER`, and load that folder"
    kind = next((name for name, mark in ELSEWHERE.items() if any(folder.glob(mark))), "")
    if not kind:
        return ""
    return (
        f"{kind}, without the {DESCRIPTION} that describes how to encode an observation: it cannot be loaded here. "
        "Export the run again without --format; or train from these weights with policy.weights"
    )


def _validated[C: BaseModel](config: type[C], table: dict[str, Any], folder: Path, plugins: Plugins) -> C:
    try:
        return config.model_validate(table, context={PLUGINS: plugins})
    except ValidationError as error:
        raise UserError(
            f"{folder / DESCRIPTION} is not valid for {config.__name__}, whose version may differ: {error}"
        ) from error
