"""Weight files of transformers compared with their `config.json` by the headers alone, before a run. Imports no torch.

Without torch the architecture cannot be built, so this checks what `config.json` says of any decoder: its layers, its
vocabulary, its widths, its head. `tensors.PublishedWeights.check` compares every name and shape when a run loads them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from rlinf_core import UserError
from rlinf_plugins_text.weights.folder import CONFIG, INDEX, index_table, listed

HEAD = "lm_head.weight"
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
EQUAL_LAYERS = frozenset(
    {"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "olmo2", "olmo3", "smollm3"}
    | {"gpt2", "gpt_neox", "cohere", "cohere2", "granite"}
)
"""Architectures whose layers all have the same tensors."""
FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
QUANTIZED = re.compile(r"\.(qweight|qzeros|scales|weight_scale\w*|SCB|absmax|quant_map|g_idx)$|quant_state|_packed$")
"""Names of tensors that quantisation adds: GPTQ, AWQ, bitsandbytes, compressed-tensors."""
OTHER_MODALITY = re.compile(r"(^|\.)(visual|vision_tower|vision_model|multi_modal_projector|audio_tower)\.")
LORA = re.compile(r"\.(lora_[AB]|lora_embedding_[AB]|base_layer|modules_to_save)\b")
LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
AT_A_TIME = 2**24
"""Bytes that are compared at once."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Stored:
    """A tensor in a file."""

    file: Path
    shape: Shape
    dtype: str
    """In safetensors' terms: F32, BF16."""


@dataclass(frozen=True)
class Headers:
    """The tensors of a folder, by the headers of its files."""

    folder: Path
    tensors: Mapping[str, Stored]

    @classmethod
    def read(cls, folder: Path, files: Collection[Path]) -> Headers:
        """Read the headers of files; raises `UserError` if one cannot be read."""
        tensors = {}
        for path in files:
            try:
                with safe_open(path, framework="np") as file:
                    for name in file.keys():  # noqa: SIM118  # not a mapping
                        part = file.get_slice(name)
                        tensors[name] = Stored(path, tuple(part.get_shape()), part.get_dtype())
            except (OSError, SafetensorError) as error:
                raise UserError(f"policy.weights: {path} cannot be read: {error}") from error
        return cls(folder, tensors)

    @cached_property
    def embedding(self) -> str:
        """The name of the token embedding; empty if none is recognised."""
        found = (name for name in self.tensors if name.endswith(EMBEDDINGS))
        return next((name for name in found if not OTHER_MODALITY.search(name)), "")


def check_headers(headers: Headers, table: Mapping[str, Any]) -> None:
    """Compare a folder's tensors with its `config.json`.

    Args:
        headers: The tensors.
        table: `config.json`, with the changes of `policy.config`.

    Raises:
        UserError: One message with every problem that was found, and what to do about it.
    """
    if problems := find_problems(headers, table):
        lines = "".join(f"\n  {problem}" for problem in problems)
        raise UserError(f"policy.weights: {headers.folder} does not match its {CONFIG}:{lines}")


def find_problems(headers: Headers, table: Mapping[str, Any]) -> list[str]:
    """What contradicts `config.json` in the headers, one sentence each; see `check_headers`."""
    problems = [*_missing_in_files(headers), *_other_software(headers, table)]
    return problems or [*_layers(headers, table), *_sizes(headers, table), *_head(headers, table)]


def _guess(names: Collection[str], dtypes: Collection[str], *, multimodal: bool) -> str:
    """What other software made of the weights, by names and dtypes; empty if unknown."""
    kinds = sorted(dtype for dtype in set(dtypes) if dtype.startswith(("I", "U", "F8", "F4")))
    if found := next((name for name in names if QUANTIZED.search(name)), ""):
        return f"the weights are quantised ({found}): use the model in float32 or bfloat16 that they were made from"
    if kinds:
        return f"the weights are {', '.join(kinds)}: use the model in float32 or bfloat16 that they were made from"
    if found := next((name for name in names if LORA.search(name)), ""):
        return f"the weights hold adapters ({found}): merge them with PEFT's merge_and_unload() and save_pretrained"
    if not multimodal and (found := next((name for name in names if OTHER_MODALITY.search(name)), "")):
        return (
            f"the weights are those of a multimodal model ({found}), and only text is trained here: save its language "
            "model by itself, with the config.json of that, or use a model for text"
        )
    return ""


def _other_software(headers: Headers, table: Mapping[str, Any]) -> Iterator[str]:
    if isinstance(kind := table.get("quantization_config"), Mapping):
        method = kind.get("quant_method", "quantization_config")
        yield f"the model is quantised ({method}): use the one in float32 or bfloat16 that it was made from"
        return
    weights = [one.dtype for name, one in headers.tensors.items() if name.endswith("weight") and len(one.shape) > 1]
    # A config.json with parts is that of a multimodal model, whose architecture may have a language model.
    if said := _guess(headers.tensors, weights, multimodal="text_config" in table or "vision_config" in table):
        yield said


def _missing_in_files(headers: Headers) -> Iterator[str]:
    """Tensors that an index lists and its files lack, as after an interrupted download or merge."""
    if (headers.folder / INDEX).exists():
        absent = sorted(index_table(headers.folder / INDEX).keys() - headers.tensors.keys())
        if absent:
            yield f"{INDEX} lists tensors that its files lack: {listed(absent)}. Download or save the folder again"


def _layers(headers: Headers, table: Mapping[str, Any]) -> Iterator[str]:
    count = _number(table, "num_hidden_layers", "n_layer")
    layers: dict[int, dict[str, Shape]] = {}
    for name, one in headers.tensors.items():
        if (match := LAYER.search(name)) and not OTHER_MODALITY.search(name):
            layers.setdefault(int(match[1]), {})[name[match.end() :]] = one.shape
    if count and layers and sorted(layers) != list(range(count)):
        missing = [str(number) for number in range(count) if number not in layers]
        yield (
            f"{CONFIG} has {count} layers, the files have {len(layers)}"
            + (f", without {listed(missing)}" if missing else f": 0 to {max(layers)}")
            + ". They belong to different models, or a file is missing"
        )
    elif layers and table.get("model_type") in EQUAL_LAYERS:
        every = {name: shape for one in layers.values() for name, shape in one.items()}
        each = sorted(layers.items())
        lacking = [f"layer {i} lacks {name}" for i, one in each for name in sorted(every.keys() - one)]
        if lacking:
            yield f"{listed(lacking)}. Is a file missing or damaged?"


def _sizes(headers: Headers, table: Mapping[str, Any]) -> Iterator[str]:
    """The widths that `config.json` states."""
    hidden = _number(table, "hidden_size", "n_embd")
    rows = _number(table, "vocab_size")
    if headers.embedding:
        found = headers.tensors[headers.embedding].shape
        if rows and len(found) == 2 and found[0] != rows and (not hidden or found[1] == hidden):
            yield (
                f"{headers.embedding} has {found[0]} rows, {CONFIG} has vocab_size = {rows}. If tokens were added, set "
                f"policy.config = {{ vocab_size = {found[0]} }}"
            )
    heads, width = _number(table, "num_attention_heads"), _number(table, "head_dim")
    groups, inner = _number(table, "num_key_value_heads"), _number(table, "intermediate_size")
    wanted = {
        **dict.fromkeys(EMBEDDINGS[:2], (None, hidden)),
        "self_attn.q_proj.weight": (heads * width, hidden),
        "self_attn.k_proj.weight": (groups * width, hidden),
        "self_attn.v_proj.weight": (groups * width, hidden),
        "self_attn.o_proj.weight": (hidden, heads * width),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }
    other = []
    for name, one in headers.tensors.items():
        shape = next((shape for end, shape in wanted.items() if name.endswith(end)), ())
        differs = [size for size, has in zip(shape, one.shape, strict=False) if size and size != has]
        if table.get("model_type") in EQUAL_LAYERS and differs:
            right = [size or has for size, has in zip(shape, one.shape, strict=False)]
            other.append(f"{name} is {list(one.shape)}, not {right}")
    if other:
        yield f"other shapes: {listed(other)}. The files belong to another model than {CONFIG}"


def _head(headers: Headers, table: Mapping[str, Any]) -> Iterator[str]:
    """A head that is tied to the embedding in one place and not in the other."""
    tied, head = table.get("tie_word_embeddings"), headers.tensors.get(HEAD)
    embedding = headers.tensors.get(headers.embedding)
    if tied is False and head is None and embedding is not None:
        yield (
            f"{CONFIG} has tie_word_embeddings = false, but the files have no {HEAD}. If the head is the embedding, "
            "set policy.config = { tie_word_embeddings = true }; else save the model with its head"
        )
    if tied is True and head is not None and embedding is not None and not _equal(HEAD, headers.embedding, headers):
        yield (
            f"{CONFIG} has tie_word_embeddings = true, but {HEAD} differs from {headers.embedding}: it was trained by "
            "itself. Set policy.config = { tie_word_embeddings = false }"
        )


def _equal(first: str, second: str, headers: Headers) -> bool:
    """Whether two tensors have the same bytes."""
    one, other = headers.tensors[first], headers.tensors[second]
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    with one.file.open("rb") as a, other.file.open("rb") as b:
        (start, end), (there, _) = _place(a, first), _place(b, second)
        a.seek(start)
        b.seek(there)
        left = end - start
        while left > 0:
            size = min(left, AT_A_TIME)
            if a.read(size) != b.read(size):
                return False
            left -= size
    return True


def _place(file: Any, name: str) -> tuple[int, int]:
    """Where the bytes of a tensor begin and end in a safetensors file, whose header safetensors has accepted."""
    length = int.from_bytes(file.read(8), "little")
    start, end = json.loads(file.read(length))[name]["data_offsets"]
    return 8 + length + start, 8 + length + end


def _number(table: Mapping[str, Any], *keys: str) -> int:
    """The first of some keys that is a positive integer; 0 if none is."""
    found = (table.get(key) for key in keys)
    return next((value for value in found if isinstance(value, int) and not isinstance(value, bool) and value > 0), 0)
