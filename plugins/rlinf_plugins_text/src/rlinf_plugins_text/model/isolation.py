"""Whether a text's loss depends on its own words alone, found out on a miniature of the architecture.

Attention within documents (`attention`) confines what goes through the attention function of transformers. Layers that
mix tokens by other means (convolutions, state spaces, linear attention), and masks that an architecture makes itself
(chunks), do not go through it. No flag of transformers shows which layers an architecture has, so architectures that
are not `KNOWN` are tried before the model is built: a few forward passes of two layers or more.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rlinf_core import UserError
from rlinf_plugins_text.model.attention import NAME
from rlinf_plugins_text.model.miniature import SPECIAL, WORDS, miniature
from rlinf_plugins_text.vision.families import FAMILIES
from rlinf_plugins_text.weights.architecture import model_class, model_config

KNOWN = frozenset(
    {"cohere", "cohere2", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "gpt2", "gpt_neox", "granite", "llama"}
    | {"mistral", "mixtral", "olmo2", "olmo3", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3"}
)
"""Architectures whose layers mix tokens by full or sliding-window attention only, which `attention` computes."""
VISION_TEXTS = frozenset(
    {"qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text", "gemma", "gemma2", "gemma3_text"}
    | {"llama", "mistral", "qwen2", "vicuna"}
)
"""The same of language models inside of vision-language models."""
KINDS = frozenset({"full_attention", "sliding_attention"})
"""Kinds of layers (`layer_types`) for which that holds."""
FIRST, SECOND = 17, 14
"""Tokens of the two texts. Their sum, a prime, is the size of no other axis."""
TOLERANCE = 1e-3
"""Difference between logits, relative to their spread, from which they count as different."""
LARGEST = 200_000_000
"""Maximum number of parameters of a miniature; a larger one is not built."""
PADDED = 'Set policy.attention = "padded"'


def check_isolation(table: Mapping[str, Any], *, documents: bool, max_length: int) -> None:
    """Raise `UserError` if texts of a batch would affect one another, or a text's logits differ from transformers'.

    Args:
        table: The model's `config.json`.
        documents: Whether texts are concatenated (`policy.attention`), instead of padded.
        max_length: Maximum length of a text, in tokens.
    """
    config = model_config(table)
    _check_rope(config, max_length)
    if documents:
        _check_interface(config)
    if config.model_type in FAMILIES:  # Which tokens see which is known: `Family.attention`.
        config = config.get_text_config()
        if config.model_type in VISION_TEXTS:
            return
    known = config.model_type in KNOWN and set(getattr(config, "layer_types", None) or ()) <= KINDS
    if known and not getattr(config, "use_bidirectional_attention", None):
        return
    if config.model_type != table.get("model_type"):
        table = config.to_dict()
    finding = _tried(json.dumps(table, sort_keys=True, default=str), documents, max_length)
    if finding:
        raise UserError(finding)


def _check_rope(config: Any, max_length: int) -> None:
    """Refuse rotary embeddings whose frequencies change with the longest text of a batch."""
    rope = getattr(config, "rope_parameters", None) or {}
    for one in (rope, *rope.values()):
        kind = one.get("rope_type") if isinstance(one, Mapping) else None
        if kind not in ("dynamic", "longrope"):
            continue
        limit = one.get("original_max_position_embeddings") or config.max_position_embeddings
        if max_length > limit:
            raise UserError(
                f"policy.max_length = {max_length}: with rope_type {kind!r}, {config.model_type} uses other "
                f"frequencies for all texts of a batch as soon as one is longer than {limit} tokens, so that a "
                f"text's loss would depend on the others. Set policy.max_length = {limit} or less"
            )


def _check_interface(config: Any) -> None:
    """Refuse architectures that do not call the attention function of transformers."""
    cls = model_class(config)
    if not cls._supports_attention_backend:
        raise UserError(
            f"{cls.__name__} uses its own attention, or none, which cannot be confined to single texts. {PADDED}"
        )


@dataclass(frozen=True)
class _Pass:
    """What a forward pass of the miniature gave for one text."""

    logits: Tensor
    """[tokens, vocabulary]"""
    modules: dict[str, Tensor]
    """Outputs of modules, in the order in which they finished."""

    def differs(self, other: _Pass) -> bool:
        return _differ(self.logits, other.logits)

    def first_difference(self, other: _Pass) -> str:
        """Name of the first module whose output differs."""
        for name, value in self.modules.items():
            there = other.modules.get(name)
            if there is not None and there.shape == value.shape and _differ(value, there):
                return name
        return ""


@functools.lru_cache(maxsize=32)
def _tried(dumped: str, documents: bool, max_length: int) -> str:
    """What keeps the architecture from being trained this way; empty: nothing."""
    table = json.loads(dumped)
    with torch.device("cpu"), torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        try:
            config = model_config(miniature(table, model_config(table).to_dict(), max_length))
            return _documents(config) if documents else _padded(config)
        except UserError as error:
            return str(error)
        except Exception as error:  # Code of any architecture, with sizes that it may not accept.
            reason = " ".join(str(error).split())[:200]
            # Padding is what transformers itself computes; nothing speaks against it.
            return (
                f"{table['model_type']} is not known to keep the texts of a batch apart, and a small model of its kind "
                f"cannot be tried ({type(error).__name__}: {reason}). {PADDED}"
                if documents
                else ""
            )


def _documents(config: Any) -> str:
    try:
        _check_size(config)
        model = _with_values(_build(config, NAME))
    except KeyError as error:
        if error.args != (NAME,):
            raise
        return (
            f"{model_class(config).__name__} has attention classes of its own, which cannot be confined to single "
            f"texts. {PADDED}"
        )
    reference = _build(config, "eager")
    reference.load_state_dict(model.state_dict())
    first, other, second = _texts()
    alone = _run(model, _joined(second), 0, SECOND)
    theirs = _run(reference.eval(), {"input_ids": second[None]}, 0, SECOND)
    packed = _run(model, _joined(first, second), FIRST, SECOND)
    changed = _run(model, _joined(other, second), FIRST, SECOND)
    if packed.differs(changed) or packed.differs(alone):
        where = packed.first_difference(changed) or packed.first_difference(alone)
        return f"{_layer(model, where)} would let texts of a batch see one another. {PADDED}"
    if alone.differs(theirs):
        where = alone.first_difference(theirs)
        return f"{_layer(model, where)} would compute something else than in transformers. {PADDED}"
    return ""


def _padded(config: Any) -> str:
    _check_size(config)
    model = _with_values(_build(config, "sdpa"))
    first, _, second = _texts()
    rows = torch.zeros(2, FIRST + SECOND, dtype=torch.int64)
    rows[0, :FIRST], rows[1, :SECOND] = first, second
    alone = _run(model, {"input_ids": second[None]}, 0, SECOND)
    padded = _run(model, {"input_ids": rows}, 0, SECOND)
    if not padded.differs(alone):
        return ""
    decoder = ": set policy.config = { is_decoder = true }" if getattr(config, "is_decoder", None) is False else ""
    return (
        f"{_layer(model, padded.first_difference(alone))} lets a token see what follows it, or other rows of the "
        f"batch, so that it cannot be trained to predict the next token{decoder}"
    )


def _build(config: Any, attention: str) -> Any:
    cls = model_class(config)
    # A copy, since the model writes its attention into it.
    return cls._from_config(copy.deepcopy(config), dtype=torch.float32, attn_implementation=attention).eval()


def _check_size(config: Any) -> None:
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in _build(config, "eager").parameters())
    if size > LARGEST:
        raise ValueError(f"it has {size:,} parameters")


def _with_values(model: Any) -> Any:
    """Draw values with which every layer matters, also where an architecture starts from zeros."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if parameter.ndim > 1:
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
        else:
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def _texts() -> tuple[Tensor, Tensor, Tensor]:
    """Two texts for the first place, one for the second."""
    first, other, second = (torch.randint(SPECIAL, WORDS, (length,)) for length in (FIRST, FIRST, SECOND))
    return first, other, second


def _joined(*texts: Tensor) -> dict[str, Any]:
    lengths = torch.tensor([0, *map(len, texts)])
    return {
        "input_ids": torch.cat(texts)[None],
        "position_ids": torch.cat([torch.arange(len(text)) for text in texts])[None],
        "documents": lengths.cumsum(0, dtype=torch.int32),
        "longest": max(map(len, texts)),
    }


def _run(model: Any, inputs: Mapping[str, Any], begin: int, size: int) -> _Pass:
    """A forward pass; of each output, the tokens from `begin` on in the last row."""
    length = inputs["input_ids"].shape[1]
    outputs: dict[str, Tensor] = {}

    def own(output: Any) -> Tensor | None:
        tensor = output[0] if isinstance(output, tuple) and output else output
        if not isinstance(tensor, Tensor) or length not in tensor.shape[1:]:
            return None
        axis = tensor.shape[1:].index(length) + 1
        return tensor[-1:].narrow(axis, begin, size).detach().float()

    def remember(name: str, output: Any) -> None:
        tensor = own(output)
        if tensor is not None:
            outputs.setdefault(name, tensor)

    hooks = [
        module.register_forward_hook(lambda _module, _inputs, output, name=name: remember(name, output))
        for name, module in model.named_modules()
        if name
    ]
    try:
        logits = own(model(**inputs, use_cache=False).logits)
    finally:
        for hook in hooks:
            hook.remove()
    if logits is None or not logits.isfinite().all():
        raise ArithmeticError("its logits are not finite")
    return _Pass(logits[0], outputs)


def _differ(one: Tensor, other: Tensor) -> bool:
    # Not `>`: NaN differs from everything.
    return not float((one - other).abs().max()) <= TOLERANCE * float(one.std())


def _layer(model: nn.Module, name: str) -> str:
    """A module in words: the part of a layer that holds it, and its class."""
    parts = name.split(".")
    place = next((place for place, part in enumerate(parts) if part.isdecimal()), len(parts))
    name = ".".join(parts[: place + 2])
    return f"{name} ({type(model.get_submodule(name)).__name__})" if name else type(model).__name__
