"""Safetensors files of transformers: read tensor by tensor, and written as a folder that `from_pretrained` loads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from rlinf_core import UserError
from rlinf_plugins_text.rows.tokenizer import FILES, TextTokenizer
from rlinf_plugins_text.vision.processor import exported_files
from rlinf_plugins_text.weights.architecture import model_class, model_config
from rlinf_plugins_text.weights.exported_config import exported_config, exported_tokenizer_config
from rlinf_plugins_text.weights.folder import CONFIG, GENERATION, HEAD, INDEX, SINGLE, generation_table, weight_files
from rlinf_plugins_text.weights.headers import Headers, find_problems

PREFIX = "model."
"""Prefix of every name, missing in files of a model saved without its head."""
SHARD_BYTES = 5 * 2**30
"""Maximum size of a weight file."""
LISTED = 8
"""Maximum number of parameters that an error message lists per problem."""


class PublishedWeights:
    """The safetensors files of a folder; see `rlinf_core.contract.module.WeightSource`.

    Args:
        folder: The folder with the files.
        names: Maps a parameter's name in the module to the names that it may have in the files, the usual one first.
        table: The model's `config.json`, for messages.
    """

    def __init__(
        self, folder: Path, names: Callable[[str], Sequence[str]], table: Mapping[str, Any] | None = None
    ) -> None:
        self._folder, self._names, self._table = folder, names, table or {}
        self._open = ExitStack()
        self._files: dict[str, Any] = {}
        self._paths: dict[str, Path] = {}
        for path in weight_files(folder, str(folder)):
            try:
                file = self._open.enter_context(safe_open(path, framework="pt"))
            except (OSError, SafetensorError) as error:
                raise UserError(f"policy.weights: {path} cannot be read: {error}") from error
            self._files |= dict.fromkeys(file.keys(), file)
            self._paths |= dict.fromkeys(file.keys(), path)
        # Files of a model saved without its head have no prefix.
        self._prefix = "" if any(name.startswith(PREFIX) for name in self._files) else PREFIX

    def tensor(self, name: str) -> torch.Tensor:
        """A parameter's whole tensor, in the dtype of the file."""
        key = self._key(name)
        tensor: torch.Tensor = self._files[key].get_tensor(key)
        return tensor

    def file_of(self, name: str) -> str:
        """The file that holds a parameter."""
        return str(self._paths[self._key(name)])

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise `UserError` that lists missing, unexpected and differently shaped parameters."""
        wanted = {self._key(name): shape for name, shape in shapes.items()}
        missing = sorted(wanted.keys() - self._files.keys())
        # Some writers also store a tied head, and buffers that the model computes itself.
        surplus = [
            name for name in self._files if name not in wanted and not name.endswith((".inv_freq", ".masked_bias"))
        ]
        surplus = sorted(name for name in surplus if not self._is_tied_head(name, wanted))
        other = [
            f"{name} is {found}, not {shape}"
            for name, shape in sorted(wanted.items())
            if name in self._files and (found := tuple(self._files[name].get_slice(name).get_shape())) != shape
        ]
        problems = [
            _listed("lacks", missing),
            _listed("has unexpected", surplus),
            _listed("has other shapes:", other),
        ]
        if any(problems):
            files = list(dict.fromkeys(self._paths.values()))
            causes = find_problems(Headers.read(self._folder, files), self._table)
            raise UserError(
                f"policy.weights: {self._folder} does not match its {CONFIG}: it {'; it '.join(filter(None, problems))}"
                f"{_head_way_out(missing, surplus)}" + "".join(f"\n  {cause}" for cause in causes)
            )

    def _key(self, name: str) -> str:
        published, *others = self._names(name)
        known = next((one for one in (published, *others) if one in self._files), None)
        return known if known is not None else published.removeprefix(self._prefix or "\0")

    def _is_tied_head(self, name: str, wanted: Mapping[str, Any]) -> bool:
        if not name.endswith(HEAD):
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
    stops: Sequence[int] = (),
) -> None:
    """Write weights, config and tokenizer.

    Args:
        folder: The folder to write to; it exists.
        tensors: Published name -> whole tensor.
        table: The model's `config.json`.
        tokenizer: Its files are copied, with the chat template used in training.
        source: The folder of the pretrained weights, whose generation settings are kept; None: there is none.
        stops: The tokens that end an answer; `eos_token_id` of both configs holds them all.
    """
    _save_tensors(folder, tensors)
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    kept = {key: value for key, value in table.items() if key not in ("torch_dtype", "dtype", "transformers_version")}
    kept |= _with_stops(kept, stops)
    config = model_config(kept)
    written = exported_config(kept, config.to_diff_dict(), dtype, model_class(config).__name__)
    (folder / CONFIG).write_text(json.dumps(written, indent=2) + "\n")
    generation = generation_table(source)
    # Without this file, transformers takes the special tokens from the model's config.
    begin = generation or {key: kept[key] for key in ("bos_token_id", "pad_token_id") if kept.get(key) is not None}
    (folder / GENERATION).write_text(json.dumps(begin | _with_stops(begin, stops), indent=2) + "\n")
    for name in FILES:
        if (tokenizer.folder / name).exists():
            shutil.copyfile(tokenizer.folder / name, folder / name)
    if (path := folder / "tokenizer_config.json").exists():
        settings = exported_tokenizer_config(json.loads(path.read_text(encoding="utf-8")), tokenizer.template_source)
        path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if tokenizer.template_source:
        (folder / "chat_template.jinja").write_text(tokenizer.template_source, encoding="utf-8")


def save_processor(folder: Path, tokenizer: TextTokenizer, changes: Mapping[str, Any]) -> None:
    """Write the files of a processor, with `policy.image_processor`, so that `AutoProcessor` loads the folder.

    Args:
        folder: The exported folder.
        tokenizer: Its folder has the processor's files, too.
        changes: `policy.image_processor`.
    """
    for name, table in exported_files(tokenizer.folder, changes).items():
        if name == "chat_template.json":  # `chat_template.jinja` has the template of the training.
            table = {"chat_template": tokenizer.template_source}
        (folder / name).write_text(json.dumps(table, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _with_stops(table: Mapping[str, Any], stops: Sequence[int]) -> dict[str, Any]:
    """`eos_token_id` with all stops; empty if the table already has them."""
    given = table.get("eos_token_id")
    known = given if isinstance(given, list) else [given]
    if set(stops) <= set(known):
        return {}
    return {"eos_token_id": list(stops) if len(stops) > 1 else stops[0]}


def _save_tensors(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write one file, or several of at most `SHARD_BYTES` with an index."""
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


def _head_way_out(missing: list[str], surplus: list[str]) -> str:
    """What to set if the head alone is missing or unexpected."""
    if [*missing, *surplus] != [HEAD]:
        return ""
    return f". Set policy.config = {{ tie_word_embeddings = {'true' if missing else 'false'} }}"


def _listed(what: str, names: list[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return f"{what} {', '.join(names[:LISTED])}{more}" if names else ""
