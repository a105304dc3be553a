"""A miniature of an architecture: its `config.json` with small sizes and the same kinds of layers.

Widths and numbers of heads shrink by one factor, so that the ratios that an architecture asserts still hold; widths of
heads, periods and rope stay. Windows and chunks that a text can outgrow become a few tokens long.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

WORDS = 128
"""Entries of the vocabulary."""
SPECIAL = 3
"""The ids of special tokens are below this."""
WINDOW = 5
"""Tokens in a window or a chunk of attention."""
CHUNK = 8
"""Tokens that a state-space layer computes at once, which changes no result."""
POSITIONS = 512
"""Maximum number of learned positions."""

WIDTHS = re.compile(r"hidden_size|d_model|n_embd|word_embed_proj_dim|lru_width|mamba_d_ssm|embedding_size|dim_model")
HEADS = re.compile(r"((encoder_|decoder_)?(num_)?attention_heads|n_heads?|num_heads|(n_)?mamba_(n_|num_)?heads)")
KEY_HEADS = re.compile(r"num_key_value_heads|num_kv_heads|n_head_kv")
SHARES = re.compile(r"linear_num_(key|value)_heads|mamba_n_groups|mamba_ngroups|n_groups")
GROUPS = re.compile(r"n_group|topk_group")
LIMITS = {
    re.compile(r".*vocab_size.*"): WORDS,
    re.compile(r".*(intermediate_size|ffn_dim|ffn_hidden_size|n_inner|d_ff)\w*|dff|dim_ff|mlp_hidden_size"): 64,
    re.compile(r"hidden_size_per_layer_input"): 16,
    re.compile(r"(moe_)?(num|n)_(local_|routed_)?experts|zero_expert_num"): 4,
    re.compile(r"(moe_)?(num_)?(experts_per_tok(en)?|topk|top_k|moe_k)(_experts|_per_tok)?"): 2,
    re.compile(r"(q|kv|o)_lora_rank"): 16,
    re.compile(r"(mamba_)?chunk_size"): CHUNK,
}
"""Keys of sizes that nothing else depends on, and what they are limited to."""
WINDOWS = re.compile(r".*(window|attention_chunk|local_attention)(_size|_length)?")

PLACES = re.compile(
    r"layer_types|layer_ids|block_type|period|offset|interval|_step|pattern|indices|idxs|first_k|dense"
    r"|window_layers|shared_layers|every|no_rope|attention_types|layers_block"
)
"""Keys that say which layers are of which kind."""


def miniature(table: Mapping[str, Any], complete: Mapping[str, Any], max_length: int) -> dict[str, Any]:
    """The `config.json` of the miniature.

    Args:
        table: The model's `config.json`.
        complete: The same with the defaults of the architecture, as `to_dict` of transformers gives it.
        max_length: Maximum length of a text in tokens; windows and chunks at least that long change nothing and stay.
    """
    small = dict(table)
    factor, kept = _factor(complete), _layers(complete)
    heads = next((v for k, v in complete.items() if HEADS.fullmatch(k) and _is_size(v)), 1)
    for key, value in complete.items():
        if isinstance(value, Mapping) and "model_type" in value:
            small[key] = miniature(table.get(key) or {}, value, max_length)
        elif key.endswith(("token_id", "token_index")):
            if (new := _special(value)) != value:
                small[key] = new
        elif isinstance(value, list) and kept and len(value) == complete["num_hidden_layers"]:
            small[key] = _size(key, value[:kept], factor, max_length)
        elif key == "num_hidden_layers" and kept:
            small[key] = kept
        elif _is_size(value) and KEY_HEADS.fullmatch(key):
            small[key] = _divisor(max(1, int(value * factor)), max(1, int(heads * factor)))
        elif (new := _size(key, value, factor, max_length)) != value:
            small[key] = new
    if not complete.get("rope_parameters") and _is_size(complete.get("max_position_embeddings")):
        small["max_position_embeddings"] = min(complete["max_position_embeddings"], POSITIONS)
    return small


def _size(key: str, value: Any, factor: float, max_length: int) -> Any:
    if isinstance(value, list):
        return [_size(key, one, factor, max_length) for one in value]
    if not _is_size(value):
        return value
    if WIDTHS.fullmatch(key) or HEADS.fullmatch(key) or SHARES.fullmatch(key):
        return max(1, round(value * factor))
    if GROUPS.fullmatch(key):
        return 1
    if WINDOWS.fullmatch(key):
        return WINDOW if value < max_length else value
    return min([value, *(limit for pattern, limit in LIMITS.items() if pattern.fullmatch(key))])


def _factor(complete: Mapping[str, Any]) -> float:
    """The smallest factor that leaves at least two heads, whole heads, and widths that are multiples of 8."""
    heads = [v for k, v in complete.items() if HEADS.fullmatch(k) and _is_size(v)]
    widths = [v for k, v in complete.items() if WIDTHS.fullmatch(k) and _is_size(v)]
    least = min(heads, default=1)
    for wanted in range(2, least):
        whole = all(one * wanted % least == 0 for one in heads)
        if whole and all(one * wanted % (8 * least) == 0 for one in widths):
            return wanted / least
    return 1.0


def _layers(complete: Mapping[str, Any]) -> int | None:
    """How many of the first layers have every kind of layer between them; None: all layers are kept."""
    layers = complete.get("num_hidden_layers")
    lists = [v for v in complete.values() if isinstance(v, list) and len(v) == layers]
    if not any(PLACES.search(key) for key, value in complete.items() if value) and isinstance(layers, int):
        return min(layers, 2)  # All layers are alike.
    shared = complete.get("num_kv_shared_layers")  # The last layers use keys of the layers before.
    if shared or not lists or not any(isinstance(one, str) for v in lists for one in v):
        return None
    kinds = [tuple(map(str, one)) for one in zip(*lists, strict=True)]
    return max(kinds.index(kind) for kind in kinds) + 1


def _divisor(wanted: int, number: int) -> int:
    return max(d for d in range(1, wanted + 1) if number % d == 0)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _special(value: Any) -> Any:
    if isinstance(value, list):
        return [_special(one) for one in value]
    return value % SPECIAL if _is_size(value) else value
