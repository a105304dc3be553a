"""What lerobot and openpi leave beside weights, compared with the run that starts from them. Imports no torch.

lerobot: `config.json` and the processors with their statistics. openpi: `assets/<name>/norm_stats.json`. The files are
somebody else's and not needed to train: what cannot be read is passed over.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlinf_core import LeRobotDatasetConfig, UserError
from rlinf_core.contract.weights.origin import Contradiction, compare_statistics, listed, table
from rlinf_core.data.statistics.importers import LEROBOT_COLUMNS, read_lerobot, read_openpi
from rlinf_core.data.transforms import RelativeActions, RelativeUnless
from rlinf_core.untrusted.text import path_inside, read_json
from rlinf_plugins_openpi.datasets.config import asset_name

if TYPE_CHECKING:
    from rlinf_core import DatasetConfig
    from rlinf_core.data.normalize import Stats
    from rlinf_plugins_openpi.settings import OpenpiSettings

MODES = {"mean_std": "MEAN_STD", "quantile": "QUANTILES"}
"""Our normalisation -> lerobot's."""
MOST_ASSETS = 64
"""Statistics of more robots are those of a base model."""


def compare_folder(
    folder: Path, policy: OpenpiSettings, data: DatasetConfig, stats: Stats | None
) -> Iterator[Contradiction]:
    """Everything beside the weights in lerobot's or openpi's form that contradicts the run.

    Args:
        folder: The folder of the weights.
        policy: The run's policy.
        data: The run's dataset.
        stats: The run's statistics.
    """
    config = _read(folder / "config.json")
    if "chunk_size" in config or "normalization_mapping" in config:
        yield from _compare_config(folder / "config.json", config, policy, data, stats)
    processor = _read(folder / "policy_preprocessor.json")
    steps = [table(one) for one in processor.get("steps", [])] if isinstance(processor.get("steps"), list) else []
    if "use_relative_actions" not in config:
        relative = [table(one.get("config")) for one in steps if one.get("registry_name") == RELATIVE_STEP]
        for step in relative:
            yield from _compare_relative(folder / "policy_preprocessor.json", step.get("enabled"), data)
    if stats is not None and policy.normalization != "none":
        for file, theirs in (*_of_processor(folder, steps), *_of_assets(folder, data.repo_id)):
            yield from compare_statistics(file, theirs, stats, policy.normalization)


RELATIVE_STEP, NORMALIZER_STEP = "relative_actions_processor", "normalizer_processor"
"""lerobot's names of steps."""


def _read(path: Path) -> dict[str, Any]:
    try:
        return table(read_json(path))
    except (OSError, ValueError):
        return {}


def _compare_config(
    file: Path, config: Mapping[str, Any], policy: OpenpiSettings, data: DatasetConfig, stats: Stats | None
) -> Iterator[Contradiction]:
    """Lerobot's `config.json`."""
    chunk = config.get("chunk_size")
    if isinstance(chunk, int) and chunk != policy.action_horizon:
        yield Contradiction(
            "weights-horizon",
            f"the weights were trained on chunks of {chunk} actions ({file}), the run has {policy.action_horizon}",
            f"Set policy.action_horizon = {chunk}, unless the run is meant to teach another length",
        )
    modes = table(config.get("normalization_mapping"))
    other = {
        name: modes[name]
        for name in ("STATE", "ACTION")
        if modes.get(name, "") not in ("", MODES[policy.normalization])
    }
    if other:
        said = ", ".join(f"{name} {mode}" for name, mode in other.items())
        yield Contradiction(
            "weights-normalization",
            f"the weights were trained on numbers normalised by {said} ({file}), {policy.type} here normalises by "
            f"{policy.normalization}",
            "Train long enough to relearn the scale of states and actions, or start from the base model",
        )
    yield from _compare_relative(file, config.get("use_relative_actions"), data)
    length = config.get("tokenizer_max_length")
    if isinstance(length, int) and length != policy.max_token_len:
        yield Contradiction(
            "weights-prompt",
            f"the weights were trained on prompts of up to {length} tokens ({file}), the run has policy.max_token_len "
            f"= {policy.max_token_len}",
            f"Set policy.max_token_len = {length} if their prompts had the same parts",
        )
    yield from _compare_features(file, table(config.get("input_features")), config, data, stats)


def _compare_features(
    file: Path, features: Mapping[str, Any], config: Mapping[str, Any], data: DatasetConfig, stats: Stats | None
) -> Iterator[Contradiction]:
    images = {
        name for name, one in features.items() if table(one).get("type") == "VISUAL" and "empty_camera" not in name
    }
    if images and isinstance(data, LeRobotDatasetConfig):
        known = {name.rpartition(".")[2] for name in images} | images
        unknown = {f"{name} ({column})" for name, column in data.images.items() if not {name, column} & known}
        if unknown:
            yield Contradiction(
                "weights-cameras",
                f"the weights were trained with the cameras {listed(images)} ({file}), the run has {listed(unknown)}",
                "Check that data.images gives each camera of the policy the view that it had",
            )
    outputs = table(config.get("output_features"))
    for key, feature, widest in (
        ("state", features.get("observation.state"), config.get("max_state_dim", 32)),
        ("actions", outputs.get("action"), config.get("max_action_dim", 32)),
    ):
        shape = table(feature).get("shape")
        width = shape[0] if isinstance(shape, list) and len(shape) == 1 else widest
        # A base model has the width of the network, not of a robot.
        if stats and key in stats and width not in (len(stats[key].mean), widest):
            yield Contradiction(
                "weights-width",
                f"the weights were trained on {width} numbers ({file}), the run has {len(stats[key].mean)}",
                "They are of another robot or other columns: check data.state and data.actions",
                key,
            )


def _compare_relative(file: Path, theirs: object, data: DatasetConfig) -> Iterator[Contradiction]:
    ours = any(isinstance(one, RelativeActions | RelativeUnless) for one in data.transforms())
    if isinstance(theirs, bool) and theirs != ours:
        kinds = {True: "relative to the state", False: "as recorded"}
        yield Contradiction(
            "weights-relative-actions",
            f"the weights were trained on actions {kinds[theirs]} ({file}), the run trains on actions {kinds[ours]}",
            "Set data.raw_action_is_delta, or data.relative, as they had it",
        )


def _of_processor(folder: Path, steps: list[dict[str, Any]]) -> Iterator[tuple[Path, Stats]]:
    """The statistics of lerobot's normaliser."""
    for step in steps:
        if step.get("registry_name") == NORMALIZER_STEP and isinstance(step.get("state_file"), str):
            try:
                file = path_inside(folder, step["state_file"])
                yield file, read_lerobot(file, LEROBOT_COLUMNS)
            except (UserError, ValueError):
                continue


def _of_assets(folder: Path, repo_id: str) -> Iterator[tuple[Path, Stats]]:
    """The statistics in openpi's assets: the dataset's own, or the only ones; a base model has those of many robots."""
    assets = folder / "assets"
    files = sorted(path for depth in ("*", "*/*") for path in assets.glob(f"{depth}/norm_stats.json"))[:MOST_ASSETS]
    own = [path for path in files if path.parent.relative_to(assets).as_posix() == asset_name(repo_id)]
    for file in own or (files if len(files) == 1 else []):
        try:
            yield file, read_openpi(file)
        except UserError:
            continue
