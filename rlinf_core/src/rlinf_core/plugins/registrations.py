"""What plugins register, and how each kind is read from a hook's result.

A reader unpacks the result of one implementation item by item, so that a malformed item affects only itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args, get_origin

from pydantic import BaseModel

from rlinf_core.contract.augmentation import AugmentationConfig
from rlinf_core.contract.command import Command
from rlinf_core.contract.environment import EnvironmentConfig
from rlinf_core.contract.evaluation import EvaluatorConfig
from rlinf_core.contract.optim import OptimizerConfig, ScheduleConfig
from rlinf_core.contract.policy import PolicyConfig
from rlinf_core.contract.run import LoggerConfig, TrainerConfig
from rlinf_core.contract.triage import TriageTest
from rlinf_core.errors import PluginError
from rlinf_core.plugins.owners import Owner

RegistrationKind = Literal[
    "policy",
    "augmentation",
    "trainer",
    "optimizer",
    "schedule",
    "logger",
    "evaluator",
    "environment",
    "triage",
    "options",
    "command",
]


@dataclass(frozen=True)
class Registered[T]:
    """Something that a plugin registered, and the name that selects it."""

    kind: RegistrationKind
    name: str
    item: T
    """A config class (any pydantic class for `options`), the `Command` of kind `command`, or a `TriageTest` class."""
    owner: Owner


class Reading(NamedTuple):
    """One item of a result with its name, or the reason why it cannot be used."""

    name: str
    item: Any
    mistake: PluginError | None = None


@dataclass(frozen=True)
class RegistrationHook:
    """The hook for one kind of registration."""

    name: str
    noun: str
    """The name of an item in messages."""
    read: Callable[[Any], Iterator[Reading]]
    """Reads the items of one implementation's result; raises whatever iterating the result raises."""


def type_of(config: object, base: type[BaseModel], field: str = "type") -> str:
    """The name that selects a config class: the one value of its field `type`, or of another field.

    Raises:
        PluginError: If it is not a subclass of `base`, or does not declare its name.
    """
    if not (isinstance(config, type) and issubclass(config, base)):
        raise PluginError(f"expected a subclass of {base.__name__}, found {config!r}")
    annotation = config.model_fields[field].annotation
    names = get_args(annotation) if get_origin(annotation) is Literal else ()
    if len(names) != 1 or not isinstance(names[0], str):
        raise PluginError(f'{config.__qualname__} must declare its name as the one value of `{field}: Literal["name"]`')
    return names[0]


def _configs(base: type[BaseModel], field: str = "type") -> Callable[[Any], Iterator[Reading]]:
    def read(result: Any) -> Iterator[Reading]:
        for config in result:
            yield _reading(config, type_of, config, base, field)

    return read


def _triage_tests(result: Any) -> Iterator[Reading]:
    for test in result:
        yield _reading(test, _name_of_test, test)


def _name_of_test(test: object) -> str:
    if not (isinstance(test, type) and issubclass(test, TriageTest)):
        raise PluginError(f"expected a subclass of TriageTest, found {test!r}")
    for key in ("name", "question"):
        if not isinstance(getattr(test, key, None), str):
            raise PluginError(f"{test.__qualname__} must set the class variable `{key}` to a text")
    return test.name


def _commands(result: Any) -> Iterator[Reading]:
    for command in result:
        yield _reading(command, _name_of_command, command)


def _name_of_command(command: object) -> str:
    if not isinstance(command, Command):
        raise PluginError(f"expected a Command, found {command!r}")
    if not re.fullmatch(r"[a-z][a-z0-9-]*", command.name):
        raise PluginError(f"a command's name has lower-case letters, digits and hyphens only, not {command.name!r}")
    return command.name


def _options(result: Any) -> Iterator[Reading]:
    if not isinstance(result, Mapping):
        raise PluginError(f"expected a mapping of names to classes, found {result!r}")
    for name, model in result.items():
        earlier = next((other for other, found in result.items() if found is model), name)
        yield _reading(model, _name_of_options, name, model, earlier)


def _name_of_options(name: object, model: object, earlier: object) -> str:
    if not isinstance(name, str) or not name:
        raise PluginError(f"expected the name of a table, found {name!r}")
    if not (isinstance(model, type) and issubclass(model, BaseModel)):
        raise PluginError(f"expected a pydantic class for the table {name!r}, found {model!r}")
    if model.model_config.get("extra") != "forbid":
        raise PluginError(f"options class {model.__qualname__} must be a pydantic model that forbids extra keys")
    for field, info in model.model_fields.items():
        if info.is_required():
            raise PluginError(f"field {field!r} of {model.__qualname__} has no default")
    if earlier != name:  # `run.plugin_options(cls)` would be ambiguous.
        raise PluginError(f"{model.__qualname__} is used for two tables, {earlier!r} and {name!r}: derive a class")
    return name


def _reading(item: Any, name_of: Callable[..., str], *arguments: Any) -> Reading:
    try:
        return Reading(name_of(*arguments), item)
    except PluginError as error:
        return Reading("", item, error)


HOOKS: Mapping[RegistrationKind, RegistrationHook] = {
    "policy": RegistrationHook("rlinf_register_policies", "policy", _configs(PolicyConfig)),
    "augmentation": RegistrationHook("rlinf_register_augmentations", "augmentation", _configs(AugmentationConfig)),
    "trainer": RegistrationHook("rlinf_register_trainers", "trainer", _configs(TrainerConfig)),
    "optimizer": RegistrationHook("rlinf_register_optimizers", "optimizer", _configs(OptimizerConfig)),
    "schedule": RegistrationHook("rlinf_register_schedules", "schedule", _configs(ScheduleConfig, "schedule")),
    "logger": RegistrationHook("rlinf_register_loggers", "logger", _configs(LoggerConfig)),
    "evaluator": RegistrationHook("rlinf_register_evaluators", "evaluator", _configs(EvaluatorConfig)),
    "triage": RegistrationHook("rlinf_register_triage", "triage test", _triage_tests),
    "environment": RegistrationHook("rlinf_register_environments", "environment", _configs(EnvironmentConfig)),
    "options": RegistrationHook("rlinf_register_options", "plugin table", _options),
    "command": RegistrationHook("rlinf_register_commands", "command", _commands),
}
"""The hook of each kind."""
