"""Write a policy for lerobot: `config.json`, `model.safetensors` and the two pipelines around the model.

lerobot (0.6) has pipeline steps where datasets and policies have transforms here. A transform without an equivalent
step is an error that names it, so that an exported policy never acts differently from the trained one. Writing does not
need lerobot; the tests load the files with lerobot's own loaders.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rlinf_core import LeRobotDatasetConfig, UserError
from rlinf_core.data.normalize import EPSILON
from rlinf_core.data.transforms import (
    CheckState,
    Concatenate,
    RelativeActions,
    RelativeUnless,
    SliceActions,
    Transform,
)
from rlinf_plugins_openpi.inputs.tokenizer import GEMMA_ENTRIES, load_processor
from rlinf_plugins_openpi.model.dimensions import CAMERAS, IMAGE_SIZE
from rlinf_plugins_openpi.model.parts import unpacked
from rlinf_plugins_openpi.weights.files import DTYPES
from rlinf_plugins_openpi.weights.names import EMBEDDING, EMBEDDING_IN_FILES, UNUSED_HEAD
from rlinf_plugins_openpi.weights.saving import Entry, published_entries, published_key, write_safetensors

if TYPE_CHECKING:
    from torch import Tensor

    from rlinf_core import DatasetConfig
    from rlinf_core.contract.policy import TrainedOn
    from rlinf_core.data.normalize import NormStats, Stats
    from rlinf_plugins_openpi.model.dimensions import Pi0Dimensions
    from rlinf_plugins_openpi.settings import OpenpiSettings

PREFIX = "model."
"""Prefix of every key: lerobot's policies have the model as an attribute of this name."""
TOKENIZER = "google/paligemma-3b-pt-224"
"""The tokenizer that lerobot's policies load from the hub."""
STATE, ACTION = "observation.state", "action"
RELATIVE = (RelativeActions, RelativeUnless)
NORMALIZATION = {"mean_std": "MEAN_STD", "quantile": "QUANTILES"}
Json = dict[str, Any]
Numbers = NDArray[np.floating]


def export_lerobot(
    policy: OpenpiSettings, tensors: Mapping[str, Tensor], folder: Path, sources: Sequence[TrainedOn]
) -> None:
    """Write the files that lerobot's `PI0Policy` or `PI05Policy` and its `make_pre_post_processors` load.

    Args:
        policy: The policy to export.
        tensors: Its parameters, with the whole embedding.
        folder: An empty folder.
        sources: The dataset that the policy was trained on, with its statistics.

    Raises:
        UserError: There are several datasets, or lerobot cannot express the policy or the transforms of its data; the
            message lists every reason.
    """
    if len(sources) > 1:
        names = ", ".join(source.name for source in sources)
        raise UserError(f"lerobot's format has statistics of one dataset: give --source, one of {names}")
    (source,) = sources
    stats = source.stats
    assert stats is not None  # Both policies normalise, so the run has statistics.
    features = read_features(policy, source.data, stats)
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


def _config(policy: OpenpiSettings, features: Features, dtype: str) -> Json:
    """The settings that inference needs; lerobot's training settings keep their defaults."""
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
    if features.relative:  # Not in every lerobot version, so left out if unused.
        step = _relative_step(features)["config"]
        config |= {
            "use_relative_actions": True,
            "relative_exclude_joints": step["exclude_joints"],
            "action_feature_names": step["action_names"],
        }
    return config


def _input_steps(policy: OpenpiSettings, features: Features) -> list[Json]:
    """In the order of lerobot's π0.5, whose prompt may contain the normalised state."""
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


def _output_steps(policy: OpenpiSettings, features: Features) -> list[Json]:
    return [
        _step("unnormalizer_processor", _normalization(policy, features.of_output())),
        _step("absolute_actions_processor", {"enabled": bool(features.relative)}),
        _step("device_processor", {"device": "cpu", "float_dtype": None}),
    ]


def _step(name: str, config: Json) -> Json:
    return {"registry_name": name, "config": config}


def _relative_step(features: Features) -> Json:
    """Lerobot finds absolute numbers by substrings of their names, so the names here are numbers of equal length."""
    names = [f"action_{number:03}" for number in range(features.action_width)] if features.relative else None
    absolute = [name for name, relative in zip(names or (), features.relative, strict=True) if not relative]
    return _step(
        "relative_actions_processor",
        {"enabled": bool(features.relative), "exclude_joints": absolute, "action_names": names},
    )


def _normalization(policy: OpenpiSettings, features: Json) -> Json:
    kind = NORMALIZATION[policy.normalization]
    # mean_std: the exported std includes epsilon (see _statistics). Quantiles: lerobot uses epsilon if the range is 0.
    return {
        "eps": 0.0 if kind == "MEAN_STD" else EPSILON,
        "features": features,
        "norm_map": {"VISUAL": "IDENTITY", "STATE": kind, "ACTION": kind},
    }


def _statistics(features: Features, stats: Stats) -> dict[str, Numbers]:
    """Statistics under lerobot's names, float32, adjusted so that lerobot's formulas give the same results as ours.

    We add 1e-6 to every standard deviation or quantile range, when normalising and when unnormalising. lerobot adds
    nothing to a quantile range, and adds epsilon to a standard deviation only when normalising. Therefore the exported
    statistics include it.
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
        # A range of 0 stays 0: lerobot then uses its own epsilon, which is equal and not lost in float32 next to q01.
        values |= {"q01": stats.q01, "q99": stats.q99 + np.where(stats.q99 > stats.q01, EPSILON, 0.0)}
    return values


def _save_statistics(statistics: Mapping[str, Numbers], path: Path) -> None:
    import torch

    entries = {key: Entry("F32", value.shape) for key, value in statistics.items()}
    tensors = ((key, torch.from_numpy(value)) for key, value in statistics.items())
    write_safetensors(path, entries, tensors, metadata={})


def stored_entries(entries: Mapping[str, Entry], dimensions: Pi0Dimensions) -> dict[str, Entry]:
    """The tensors of lerobot's file: openpi's names with a prefix, and the embedding under both of its names.

    lerobot does not tie the two.
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


def notes_for_lerobot(policy: OpenpiSettings, sources: Sequence[TrainedOn]) -> tuple[str, ...]:
    """What lerobot's files cannot express, for those who run the policy with lerobot; one sentence each."""
    (source,) = sources
    assert source.stats is not None
    features = read_features(policy, source.data, source.stats)
    notes = [f"`{name}` is the training data's column `{column}`." for name, column in features.images.items()]
    notes += features.notes
    if features.relative:
        notes.append(
            "Actions are relative to the state at the start of a chunk: execute whole chunks, or run it with "
            "`--inference.type=rtc`. `select_action` would add the state of each later step."
        )
    if policy.rtc_training_max_delay:
        notes.append(
            f"It was trained for real-time chunking with delays of up to {policy.rtc_training_max_delay} actions. "
            "lerobot does not give it the actions that are executed meanwhile, but can guide it, as any policy: "
            "`--inference.type=rtc`."
        )
    notes.append(
        "Images that are not 224 x 224 are resized by lerobot without antialiasing, unlike in training: pass "
        "224 x 224 images for equal actions. lerobot keeps underscores in `task`; in training they are spaces."
    )
    return tuple(notes)


@dataclass(frozen=True)
class Features:
    """The inputs and outputs of a policy under lerobot's names."""

    images: Mapping[str, str]
    """lerobot's name -> column of the dataset, in the model's camera order."""
    state_width: int
    """0: no state."""
    action_width: int
    relative: tuple[bool, ...]
    """[action_width], which numbers of the action are relative to the state; empty if none is."""
    notes: tuple[str, ...]
    """Requirements on the caller that lerobot's files cannot express."""

    def of_input(self) -> dict[str, Any]:
        """Cameras, then the state."""
        # The model accepts images of any size; lerobot only uses the shape to recognise images.
        images = {name: {"type": "VISUAL", "shape": [3, IMAGE_SIZE, IMAGE_SIZE]} for name in self.images}
        return images | ({STATE: {"type": "STATE", "shape": [self.state_width]}} if self.state_width else {})

    def of_output(self) -> dict[str, Any]:
        """The action."""
        return {ACTION: {"type": "ACTION", "shape": [self.action_width]}}


def read_features(policy: OpenpiSettings, data: DatasetConfig, stats: Stats) -> Features:
    """The features of a policy. Raises `UserError` with everything that lerobot cannot express."""
    transforms = tuple(data.transforms())
    if problems := [*_problems(policy, data, transforms, stats)]:
        raise UserError("lerobot cannot represent this policy: " + "; ".join(problems))
    assert isinstance(data, LeRobotDatasetConfig)
    width = min([t.width for t in transforms if isinstance(t, SliceActions)] or [len(stats["actions"].mean)])
    # Statistics from a file (data.norm_stats) may be wider than the data.
    widths = [len(stats["state"].mean)] if data.state else []
    widths += [t.width for t in transforms if isinstance(t, CheckState)]
    # lerobot recognises observations by their prefix; other columns get the policy's camera names.
    columns = [(camera, data.images[camera]) for camera in CAMERAS if camera in data.images]
    return Features(
        images={
            column if column.startswith("observation.") else f"observation.images.{camera}": column
            for camera, column in columns
        },
        state_width=min(widths) if data.state else 0,
        action_width=width,
        relative=next((_mask(t, width) for t in transforms if isinstance(t, RELATIVE)), ()),
        notes=tuple(_notes(data)),
    )


def _notes(data: LeRobotDatasetConfig) -> Iterator[str]:
    if data.default_prompt and not data.prompt_from_task:
        yield f"`task` was always `{data.default_prompt}` in training: pass the same."
    elif data.default_prompt:
        yield f"Without a task, pass `{data.default_prompt}` as `task`, as in training."
    if data.stride > 1:
        yield f"The actions of a chunk are {data.stride} frames of the training data apart, not one."


def _mask(transform: RelativeActions | RelativeUnless, width: int) -> tuple[bool, ...]:
    if isinstance(transform, RelativeUnless):
        return tuple(number not in transform.absolute for number in range(width))
    return (*transform.mask, *(False,) * width)[:width]


def _problems(
    policy: OpenpiSettings, data: DatasetConfig, transforms: tuple[Transform, ...], stats: Stats
) -> Iterator[str]:
    if policy.variant != "base":
        yield f"it builds the published size only, and policy.variant is {policy.variant!r}"
    elif (entries := load_processor(policy.files()["tokenizer"]).vocab_size()) < GEMMA_ENTRIES:
        yield f"it reads {TOKENIZER}'s tokenizer, and policy.tokenizer has {entries} entries"
    name = data.config_name or type(data).__name__
    repack = data.repack()
    if not isinstance(data, LeRobotDatasetConfig) or type(repack) is not Concatenate:
        yield f"{name} repacks rows by {type(repack).__name__}, for which it has no step"
        return
    if repack.crops:
        yield f"{name} crops {', '.join(repack.crops)}, for which it has no step"
    if len(data.state) > 1:
        yield f"its state is one column, and data.state joins {', '.join(data.state)}"
    if not data.state and policy.type == "pi0":
        yield "its π0 needs a state, and data.state is empty"
    if others := [type(t).__name__ for t in transforms if type(t) not in (SliceActions, CheckState, *RELATIVE)]:
        yield f"it has no step for {', '.join(others)} of {name}"
    relative = [t for t in transforms if isinstance(t, RELATIVE)]
    if len(relative) > 1:
        yield f"it makes actions relative only once, {name} does so {len(relative)} times"
    if relative and data.state and len(stats["state"].mean) < len(stats["actions"].mean):
        yield "its relative actions need a state with at least as many numbers as the action"
