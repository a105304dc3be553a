"""The architecture that a `config.json` selects: the config object of transformers, with wrong keys refused."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import inspect
import re
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from rlinf_core import UserError
from rlinf_plugins_text.vision.families import FAMILIES
from rlinf_plugins_text.weights.folder import CONFIG

OLDER = frozenset({"torch_dtype", "rope_theta", "rope_scaling", "partial_rotary_factor"})
"""Keys of older `config.json` files that transformers translates into others."""


def model_config(table: Mapping[str, Any]) -> Any:
    """The config object of transformers for the contents of a `config.json`.

    Raises:
        UserError: transformers does not know the architecture, or refuses a value.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    # A copy, since transformers writes into the tables, such as `rope_scaling`.
    rest = {key: copy.deepcopy(value) for key, value in table.items() if key != "model_type"}
    kind = table.get("model_type", "")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise UserError(
            f"the model's {CONFIG} (policy.weights, policy.config): transformers has no model_type {kind!r}"
            f"{_near(str(kind), CONFIG_MAPPING.keys())}"
        )
    try:
        return AutoConfig.for_model(kind, **rest)
    except (ValueError, TypeError, KeyError, ArithmeticError, StrictDataclassError) as error:
        raise refused_values(error) from error


def refused_values(error: Exception) -> UserError:
    """The `UserError` for a config that transformers cannot work with."""
    reason = " ".join(str(error).split())
    return UserError(f"the model's {CONFIG} (policy.weights, policy.config): {type(error).__name__}: {reason}")


def check_keys(changes: Mapping[str, Any], config: Any) -> None:
    """Raise `UserError` for keys that the architecture does not read; transformers itself accepts any.

    Args:
        changes: `policy.config`.
        config: The config object built with them.
    """
    known = {field.name for field in dataclasses.fields(type(config))} | config.attribute_map.keys()
    known |= OLDER | {"model_type"}
    # The code of some architectures reads keys that are not fields of their config, such as `head_dim`.
    modules = {type(config).__module__, model_class(config).__module__}
    code = "\n".join(inspect.getsource(sys.modules[name]) for name in sorted(modules))
    for key in sorted(changes.keys() - known):
        if not re.search(rf"(?:config\.|[\"']){re.escape(key)}\b", code):
            raise UserError(f"policy.config: {config.model_type} has no {key!r}{_near(key, known)}")


def model_class(config: Any) -> Any:
    """The model class of transformers for a config object.

    Raises:
        UserError: It is neither a causal language model nor a vision-language model of a known family.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    if config.model_type in FAMILIES:
        seeing: Any = AutoModelForImageTextToText._model_mapping
        return seeing[type(config)]
    mapping: Any = AutoModelForCausalLM._model_mapping
    if type(config) not in mapping:
        parts = " (it is a multimodal model: use its language model alone)" if hasattr(config, "text_config") else ""
        raise UserError(f"model_type {config.model_type!r} is not a causal language model of transformers{parts}")
    return mapping[type(config)]


def _near(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, sorted(names), n=3)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
