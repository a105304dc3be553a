"""Write a policy as lerobot reads it: `config.json`, `model.safetensors` and the two pipelines around the model.

lerobot (0.6) keeps as steps of a pipeline what is a dataset's and a policy's transforms here. Some of ours have such a
step; what has none is an error that names it, so that no exported policy acts otherwise than the trained one. lerobot
itself is not needed for writing; the tests hold the files against its own loaders.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rlinf_core.data.normalize import EPSILON
from rlinf_plugins_openpi.export.lerobot_features import ACTION, STATE, TOKENIZER, Features, read_features
from rlinf_plugins_openpi.inputs.transforms import IMAGE_SIZE
from rlinf_plugins_openpi.model.parts import unpacked
from rlinf_plugins_openpi.weights.files import DTYPES
from rlinf_plugins_openpi.weights.names import EMBEDDING, EMBEDDING_IN_FILES, UNUSED_HEAD
from rlinf_plugins_openpi.weights.saving import Entry, published_entries, published_key, write_safetensors

if TYPE_CHECKING:
    from torch import Tensor

    from rlinf_core import DatasetConfig
    from rlinf_core.data.normalize import NormStats, Stats
    from rlinf_plugins_openpi.config import OpenpiPolicyConfig
    from rlinf_plugins_openpi.model.dimensions import Pi0Dimensions

PREFIX = "model."
"""Before every key: lerobot's policies hold the model under this name."""
NORMALIZATION = {"mean_std": "MEAN_STD", "quantile": "QUANTILES"}
Json = dict[str, Any]
Numbers = NDArray[np.floating]


def export_lerobot(
    policy: OpenpiPolicyConfig, tensors: Mapping[str, Tensor], folder: Path, data: DatasetConfig, stats: Stats
) -> None:
    """Write what lerobot's `PI0Policy` or `PI05Policy` and its `make_pre_post_processors` load.

    Args:
        policy: Whose weights these are.
        tensors: As `PolicyConfig.export` takes them.
        folder: An empty folder.
        data: The dataset the policy was trained on.
        stats: The statistics it was trained with.

    Raises:
        UserError: lerobot cannot express the policy or what is done to its data; every reason is named.
    """
    features = read_features(policy, data, stats)
    _save_weights(tensors, folder / "model.safetensors", policy.dimensions)
    in_bf16 = all(str(tensor.dtype) == "torch.bfloat16" for tensor in tensors.values())
    _write_json(folder / "config.json", _config(policy, features, "bfloat16" if in_bf16 else "float32"))
    normalizer = _statistics(features, stats)
    for name, steps in (
        ("policy_preprocessor", _input_steps(policy, features)),
        ("policy_postprocessor", _output_steps(policy, features)),
    ):
        for number, step in enumerate(steps):
            if "normalizer" in step["registry_name"]:
                step["state_file"] = f"{name}_step_{number}_{step['registry_name']}.safetensors"
                _save_statistics(normalizer, folder / step["state_file"])
        _write_json(folder / f"{name}.json", {"name": name, "steps": steps})
    (folder / "README.md").write_text(_readme(policy, features), encoding="utf-8")


def _config(policy: OpenpiPolicyConfig, features: Features, dtype: str) -> Json:
    """What the policy decides; the rest, how lerobot would train it, is left to lerobot's defaults."""
    normalization = NORMALIZATION[policy.normalization]
    config = {
        "type": policy.type,
        "input_features": features.of_input(),
        "output_features": features.of_output(),
        "normalization_mapping": {"VISUAL": "IDENTITY", "STATE": normalization, "ACTION": normalization},
        "paligemma_variant": "gemma_2b",
        "action_expert_variant": "gemma_300m",
        "dtype": dtype,
        "chunk_size": policy.action_horizon,
        "n_action_steps": policy.action_horizon,
        "max_state_dim": policy.action_dim,
        "max_action_dim": policy.action_dim,
        "num_inference_steps": policy.num_sampling_steps,
        "image_resolution": [IMAGE_SIZE, IMAGE_SIZE],
        "tokenizer_max_length": policy.max_token_len,
    }
    if features.relative:  # Not in every version's config, so left out where it says nothing.
        step = _relative_step(features)["config"]
        config |= {
            "use_relative_actions": True,
            "relative_exclude_joints": step["exclude_joints"],
            "action_feature_names": step["action_names"],
        }
    return config


def _input_steps(policy: OpenpiPolicyConfig, features: Features) -> list[Json]:
    """The order is π0.5's in lerobot: the prompt may hold the normalised state."""
    if policy.discrete_state_input:
        prompt = _step("pi05_prepare_state_tokenizer_processor_step", {})
    else:
        prompt = _step("pi0_new_line_processor", {})
    tokenizer = {
        "max_length": policy.max_token_len,
        "task_key": "task",
        "padding_side": "right",
        "padding": "max_length",
        "truncation": True,
        "tokenizer_name": TOKENIZER,
    }
    return [
        _step("rename_observations_processor", {"rename_map": {}}),
        _step("to_batch_processor", {}),
        _relative_step(features),
        _step("normalizer_processor", _normalization(policy, features.of_input() | features.of_output())),
        prompt,
        _step("tokenizer_processor", tokenizer),
        _step("device_processor", {"device": "cpu", "float_dtype": None}),
    ]


def _output_steps(policy: OpenpiPolicyConfig, features: Features) -> list[Json]:
    return [
        _step("unnormalizer_processor", _normalization(policy, features.of_output())),
        _step("absolute_actions_processor", {"enabled": bool(features.relative)}),
        _step("device_processor", {"device": "cpu", "float_dtype": None}),
    ]


def _step(name: str, config: Json) -> Json:
    return {"registry_name": name, "config": config}


def _relative_step(features: Features) -> Json:
    """Lerobot tells absolute numbers by names, of which any part may match: numbered ones, equally long."""
    names = [f"action_{number:03}" for number in range(features.action_width)] if features.relative else None
    absolute = [name for name, relative in zip(names or (), features.relative, strict=True) if not relative]
    return _step(
        "relative_actions_processor",
        {"enabled": bool(features.relative), "exclude_joints": absolute, "action_names": names},
    )


def _normalization(policy: OpenpiPolicyConfig, features: Json) -> Json:
    kind = NORMALIZATION[policy.normalization]
    # Beside the spread itself for mean_std (see _statistics); in place of a spread of 0 for quantiles.
    return {
        "eps": 0.0 if kind == "MEAN_STD" else EPSILON,
        "features": features,
        "norm_map": {"VISUAL": "IDENTITY", "STATE": kind, "ACTION": kind},
    }


def _statistics(features: Features, stats: Stats) -> dict[str, Numbers]:
    """The statistics by lerobot's names, float32, such that lerobot's formulas give what ours give.

    Ours add 1e-6 to every spread, both ways. lerobot's add nothing to a quantile range, and their epsilon to a standard
    deviation one way only. So it is part of the statistics here.
    """
    widths = {STATE: features.state_width, ACTION: features.action_width}
    found: dict[str, Numbers] = {}
    for name, key in ((STATE, "state"), (ACTION, "actions")):
        if widths[name]:
            found |= {f"{name}.{kind}": value[: widths[name]] for kind, value in _with_epsilon(stats[key]).items()}
    return {key: value.astype(np.float32) for key, value in found.items()}


def _with_epsilon(stats: NormStats) -> dict[str, Numbers]:
    values = {"mean": stats.mean, "std": stats.std + EPSILON}
    if not np.isnan(stats.q01).any():
        # A range of 0 stays 0: there lerobot takes its own epsilon, which is the same and is not rounded beside q01.
        values |= {"q01": stats.q01, "q99": stats.q99 + np.where(stats.q99 > stats.q01, EPSILON, 0.0)}
    return values


def _save_statistics(statistics: Mapping[str, Numbers], path: Path) -> None:
    import torch

    entries = {key: Entry("F32", value.shape) for key, value in statistics.items()}
    tensors = ((key, torch.from_numpy(value)) for key, value in statistics.items())
    write_safetensors(path, entries, tensors, metadata={})


def stored_entries(entries: Mapping[str, Entry], dimensions: Pi0Dimensions) -> dict[str, Entry]:
    """What lerobot's file holds: openpi's names behind a prefix, the embedding under both of its names, which lerobot
    does not tie.
    """
    published = published_entries(entries, dimensions)
    published[EMBEDDING] = published[EMBEDDING_IN_FILES]
    return {PREFIX + key: entry for key, entry in published.items()}


def _save_weights(parameters: Mapping[str, Tensor], path: Path, dimensions: Pi0Dimensions) -> None:
    state = unpacked(parameters, dimensions)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in state.items():
            yield PREFIX + published_key(name, dimensions), tensor
        yield PREFIX + EMBEDDING, state["embedding.weight"]

    entries = {name: Entry(DTYPES[str(tensor.dtype)], tuple(tensor.shape)) for name, tensor in state.items()}
    stored = stored_entries(entries, dimensions)
    write_safetensors(path, stored, tensors(), zeros={PREFIX + UNUSED_HEAD}, metadata={"format": "pt"})


def _write_json(path: Path, content: Json) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _readme(policy: OpenpiPolicyConfig, features: Features) -> str:
    """What whoever runs it with lerobot has to know."""
    lines = [f"# {'π0.5' if policy.type == 'pi05' else 'π0'} for lerobot", ""]
    lines += [f"- `{name}` is the training data's column `{column}`." for name, column in features.images.items()]
    lines += [f"- {note}" for note in features.notes]
    if features.relative:
        lines.append("- Actions are relative to the state at the start of a chunk: decode whole chunks, or run it with")
        lines.append("  `--inference.type=rtc`. `select_action` would add the state of each later step.")
    lines.append("- Images that are not 224 x 224 are resized by lerobot without antialiasing, unlike in training:")
    lines.append(
        "  hand in 224 x 224 for the same actions. Underscores in `task` are kept, in training they are spaces."
    )
    return "\n".join(lines) + "\n"
