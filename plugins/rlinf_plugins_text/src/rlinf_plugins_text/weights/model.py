"""Weights in the files of transformers: read tensor by tensor, and written as a folder that `from_pretrained` loads."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from rlinf_core import UserError
from rlinf_plugins_text.rows.tokenizer import FILES, TextTokenizer
from rlinf_plugins_text.weights.folder import CONFIG, GENERATION, INDEX, SINGLE, weight_files

PREFIX = "model."
"""What files of a model without its head lack in every name."""
SHARD_BYTES = 5 * 2**30
LISTED = 8
OLDER = frozenset({"torch_dtype", "rope_theta", "rope_scaling", "partial_rotary_factor"})
"""Keys of older `config.json` that transformers turns into others."""


class PublishedWeights:
    """The safetensors of a folder; see `rlinf_core.contract.policy.WeightSource`.

    Args:
        folder: Holds the files.
        published_name: From the module's own name of a parameter to the files'.
    """

    def __init__(self, folder: Path, published_name: Callable[[str], str]) -> None:
        self._folder, self._published_name = folder, published_name
        self._open = ExitStack()
        self._files: dict[str, Any] = {}
        for path in weight_files(folder, str(folder)):
            try:
                file = self._open.enter_context(safe_open(path, framework="pt"))
            except (OSError, SafetensorError) as error:
                raise UserError(f"policy.weights: {path} cannot be read: {error}") from error
            self._files |= dict.fromkeys(file.keys(), file)
        # Files of the model without its head leave the prefix out.
        self._prefix = "" if any(name.startswith(PREFIX) for name in self._files) else PREFIX

    def tensor(self, name: str) -> torch.Tensor:
        """The whole tensor of a parameter, in the dtype of the file."""
        key = self._key(name)
        tensor: torch.Tensor = self._files[key].get_tensor(key)
        return tensor

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise `UserError` naming every parameter that is missing, unexpected or of another shape."""
        wanted = {self._key(name): shape for name, shape in shapes.items()}
        missing = sorted(wanted.keys() - self._files.keys())
        # A head that is the embedding is written twice by some; so are buffers that the model computes.
        surplus = [
            name for name in self._files if name not in wanted and not name.endswith((".inv_freq", ".masked_bias"))
        ]
        surplus = sorted(name for name in surplus if not self._is_tied_head(name, wanted))
        other = [
            f"{name} is {found}, not {shape}"
            for name, shape in sorted(wanted.items())
            if name in self._files and (found := tuple(self._files[name].get_slice(name).get_shape())) != shape
        ]
        problems = [_listed("lacks", missing), _listed("has, without use for it,", surplus), _listed("differs:", other)]
        if any(problems):
            raise UserError(
                f"policy.weights: {self._folder} does not fit its {CONFIG}: it {'; it '.join(filter(None, problems))}"
            )

    def _key(self, name: str) -> str:
        published = self._published_name(name)
        return published if published in self._files else published.removeprefix(self._prefix or "\0")

    def _is_tied_head(self, name: str, wanted: Mapping[str, Any]) -> bool:
        if name != "lm_head.weight":
            return False
        embedding = next((one for one in wanted if one.endswith(("embed_tokens.weight", "wte.weight"))), None)
        if embedding not in self._files:
            return False
        tensors = [self._files[one].get_tensor(one) for one in (name, embedding)]
        return torch.equal(*tensors)


def save_folder(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    table: Mapping[str, Any],
    tokenizer: TextTokenizer,
    source: Path | None,
) -> None:
    """Write weights, config and tokenizer.

    Args:
        folder: Where to.
        tensors: Published name -> whole tensor.
        table: The model's `config.json`.
        tokenizer: Whose files are copied, with the chat template that was trained with.
        source: The folder of the pretrained weights, whose settings of generation are kept.
    """
    _save_tensors(folder, tensors)
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    kept = {key: value for key, value in table.items() if key not in ("torch_dtype", "dtype", "transformers_version")}
    config = model_config(kept)
    (folder / CONFIG).write_text(
        json.dumps(config.to_diff_dict() | {"architectures": _class(config), "dtype": dtype}, indent=2) + "\n"
    )
    if source is not None and (source / GENERATION).exists():
        shutil.copyfile(source / GENERATION, folder / GENERATION)
    for name in FILES:
        if (tokenizer.folder / name).exists():
            shutil.copyfile(tokenizer.folder / name, folder / name)
    if tokenizer.template_source:
        (folder / "chat_template.jinja").write_text(tokenizer.template_source, encoding="utf-8")


def model_config(table: Mapping[str, Any]) -> Any:
    """The config object of transformers.

    Raises:
        UserError: It knows no such architecture, or refuses a value.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    rest, kind = {key: value for key, value in table.items() if key != "model_type"}, table.get("model_type", "")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise UserError(
            f"the model's {CONFIG} (policy.weights, policy.config): transformers knows no model_type {kind!r}"
            f"{_near(str(kind), CONFIG_MAPPING.keys())}"
        )
    try:
        return AutoConfig.for_model(kind, **rest)
    except (ValueError, TypeError, KeyError, ArithmeticError, StrictDataclassError) as error:
        raise refused_values(error) from error


def refused_values(error: Exception) -> UserError:
    """The error to raise where transformers cannot work with a model's settings."""
    reason = " ".join(str(error).split())
    return UserError(f"the model's {CONFIG} (policy.weights, policy.config): {type(error).__name__}: {reason}")


def check_keys(changes: Mapping[str, Any], config: Any) -> None:
    """Raise `UserError` for keys that the architecture does not read; transformers takes any.

    Args:
        changes: `policy.config`.
        config: The config object made with them.
    """
    known = {field.name for field in dataclasses.fields(type(config))} | config.attribute_map.keys()
    known |= OLDER | {"model_type"}
    # Architectures also read keys that are no fields of their config, such as `head_dim`.
    modules = {type(config).__module__, model_class(config).__module__}
    code = "\n".join(inspect.getsource(sys.modules[name]) for name in sorted(modules))
    for key in sorted(changes.keys() - known):
        if not re.search(rf"(?:config\.|[\"']){re.escape(key)}\b", code):
            raise UserError(f"policy.config: {config.model_type} has no {key!r}{_near(key, known)}")


def model_class(config: Any) -> Any:
    """The class of transformers for a config object. Raises `UserError`: it is no causal language model."""
    from transformers import AutoModelForCausalLM

    mapping: Any = AutoModelForCausalLM._model_mapping
    if type(config) not in mapping:
        raise UserError(f"model_type {config.model_type!r} is no causal language model of transformers")
    return mapping[type(config)]


def _class(config: Any) -> list[str]:
    return [model_class(config).__name__]


def _save_tensors(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """One file, or several of five gigabytes with an index."""
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if size and size + tensor.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor.contiguous()
        size += tensor.nbytes
    if len(shards) == 1:
        save_file(shards[0], folder / SINGLE, metadata={"format": "pt"})
        return
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _listed(what: str, names: list[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return f"{what} {', '.join(names[:LISTED])}{more}" if names else ""


def _near(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, sorted(names), n=3)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
