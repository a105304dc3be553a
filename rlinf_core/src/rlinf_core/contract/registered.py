"""Fields of a config whose class a plugin registered, chosen by the key `type`: augmentations, environments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError, ValidationInfo
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError

from rlinf_core.errors import UserError, did_you_mean

PLUGINS = "plugins"
"""Key of the plugins in the context in which a config is validated: what finds the class of a name."""
REGISTERED_CLASS = "registered_class"
"""Type of the errors in an entry whose class a plugin registered. They are complete sentences."""


def resolve(entry: object, info: ValidationInfo, kind: str, base: type[BaseModel], noun: str) -> Any:
    """The config of an entry.

    Args:
        entry: A name, a table with `type`, or an instance of the base class.
        info: Of the validation; its context has the plugins.
        kind: What plugins register it as.
        base: The class from which it must be derived.
        noun: What it is, with an article.

    Raises:
        ValueError: Nobody registered it, or its table is invalid, in words for users.
    """
    if isinstance(entry, base):
        return entry
    table = {"type": entry} if isinstance(entry, str) else entry
    name = table.get("type") if isinstance(table, Mapping) else None
    if not isinstance(name, str):
        raise _mistake(f"must be the name of {noun}, or a table with its name as `type`{_got(entry)}")
    plugins = (info.context or {}).get(PLUGINS)
    if plugins is None:
        raise _mistake(f"{name!r} is a name, which only a config file can use: pass an instance of the class")
    try:
        found = plugins.find(kind, name)
    except UserError as error:
        raise _mistake(str(error)) from error
    try:
        return found.item.model_validate(table, context=info.context)
    except ValidationError as error:
        details = [_explain(one, found.item, found.owner) for one in error.errors(include_url=False)]
        raise ValidationError.from_exception_data(found.item.__name__, details) from error


def _explain(error: ErrorDetails, model: type[BaseModel], owner: object) -> InitErrorDetails:
    """An error in its table, in words that need no knowledge of its class."""
    if error["type"] == "extra_forbidden":
        keys = [name for name in model.model_fields if name != "type"]
        known = f"its keys are {', '.join(keys)}" if keys else "it has no keys"
        said = f"unknown key{did_you_mean(str(error['loc'][-1]), keys)} ({known})"
    elif error["type"] == "missing":
        said = "is required"
    else:
        said = f"{error['msg'].removeprefix('Value error, ')}{_got(error['input'])}"
    return InitErrorDetails(type=_mistake(said, owner), loc=error["loc"], input=error["input"])


def _mistake(message: str, owner: object = None) -> PydanticCustomError:
    return PydanticCustomError(REGISTERED_CLASS, "{message}", {"message": message, "owner": owner})


def _got(value: object) -> str:
    return "" if isinstance(value, Mapping) else f" (got {value!r:.80})"
