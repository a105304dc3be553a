"""The `config.json` of an export, in the words of transformers 4 and 5.

transformers 5 moves `rope_theta` and `rope_scaling` into `rope_parameters` and renames `torch_dtype` to `dtype`. A
reader that knows only the older keys takes its defaults without a word: another base of the rotary embedding. An export
therefore has both, and every other key of the base's own `config.json`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LEFT_OUT = frozenset({"torch_dtype", "dtype", "transformers_version", "architectures", "_name_or_path"})
"""Keys that describe the base's file, not the model."""


def exported_config(
    table: Mapping[str, Any], written: Mapping[str, Any], dtype: str, class_name: str
) -> dict[str, Any]:
    """The contents of `config.json`.

    Args:
        table: The base's `config.json` with `policy.config` applied.
        written: The same as the installed transformers writes it.
        dtype: Of the exported weights, such as `"bfloat16"`.
        class_name: The model's class in transformers.
    """
    kept = {key: value for key, value in table.items() if key not in LEFT_OUT}
    # The older keys follow from the new ones, which policy.config may have changed.
    result = kept | dict(written) | _older_rope(written, kept)
    for name, part in written.items():  # The parts of a vision-language model: `text_config`, `vision_config`.
        if isinstance(part, Mapping) and "model_type" in part:
            given = kept.get(name)
            own = {k: v for k, v in given.items() if k not in LEFT_OUT} if isinstance(given, Mapping) else {}
            result[name] = own | {k: v for k, v in part.items() if k not in LEFT_OUT} | _older_rope(part, own)
    tied = result["tie_word_embeddings"] = bool(
        written.get("tie_word_embeddings", kept.get("tie_word_embeddings", False))
    )
    if isinstance(result.get("text_config"), dict):  # Where transformers 4 looks.
        result["text_config"]["tie_word_embeddings"] = tied
    return result | {"architectures": [class_name], "dtype": dtype, "torch_dtype": dtype}


def _older_rope(written: Mapping[str, Any], kept: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of transformers 4 for `rope_parameters`; none for models without."""
    rope = written.get("rope_parameters")
    if not isinstance(rope, Mapping) or not rope:
        return {}
    if "rope_theta" in rope:
        return _older(rope)
    full, sliding = rope.get("full_attention"), rope.get("sliding_attention")
    if not isinstance(full, Mapping) or "rope_theta" not in full:
        return {}
    result = _older(full)
    if isinstance(sliding, Mapping) and "rope_theta" in sliding:
        if written.get("model_type") == "modernbert-decoder":
            result |= {"global_rope_theta": full["rope_theta"], "local_rope_theta": sliding["rope_theta"]}
        elif "rope_local_base_freq" in kept or str(written.get("model_type")).startswith("gemma3"):
            result["rope_local_base_freq"] = sliding["rope_theta"]
    return result


def _older(rope: Mapping[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = {"rope_theta": rope["rope_theta"]}
    if "partial_rotary_factor" in rope:
        result["partial_rotary_factor"] = rope["partial_rotary_factor"]
    scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}
    scaled = scaling.get("rope_type", "default") != "default" or "mrope_section" in scaling
    # Readers before transformers 4.43 know `type` instead of `rope_type`.
    result["rope_scaling"] = scaling | {"type": scaling["rope_type"]} if scaled else None
    return result


def exported_tokenizer_config(table: Mapping[str, Any], template: str) -> dict[str, Any]:
    """The contents of `tokenizer_config.json`, which readers of transformers 4 accept too.

    Args:
        table: The base's file.
        template: The chat template used in training, which also goes to `chat_template.jinja`; empty: there is none.
    """
    result = dict(table)
    if result.get("tokenizer_class") == "TokenizersBackend":  # The same class; transformers 5 knows both names.
        result["tokenizer_class"] = "PreTrainedTokenizerFast"
    extra = result.get("extra_special_tokens")
    if isinstance(extra, list):  # transformers 4 expects a table here, and lists under the older key.
        del result["extra_special_tokens"]
        result.setdefault("additional_special_tokens", extra)
    if template:
        own = result.get("chat_template")
        named = [one for one in own if one.get("name") != "default"] if isinstance(own, list) else []
        result["chat_template"] = [{"name": "default", "template": template}, *named] if named else template
    return result
