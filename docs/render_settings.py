"""Write docs/settings.md, the table of every key of the config, from the classes that validate them.

python docs/render_settings.py
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from rlinf_core import (
    AugmentationConfig,
    DatasetConfig,
    EvaluatorConfig,
    LeRobotDatasetConfig,
    PolicyConfig,
    RunConfig,
    TrainerConfig,
)
from rlinf_core.augmentations.random_erasing import RandomErasingConfig
from rlinf_core.config.toml import dotted, write_toml
from rlinf_core.contract.environment import EnvironmentConfig
from rlinf_core.contract.optim import (
    AdamWConfig,
    CosineConfig,
    DecayConfig,
    OptimConfig,
    OptimizerConfig,
    ScheduleConfig,
    WarmupConfig,
)
from rlinf_core.contract.tables.cluster import ClusterConfig
from rlinf_core.contract.tables.mixture import MixtureShare
from rlinf_core.contract.tables.runner import RunnerConfig
from rlinf_core.contract.tables.slurm import SlurmConfig
from rlinf_core.evaluators.held_out import HeldOutConfig
from rlinf_core.evaluators.simulator import SimulatorConfig
from rlinf_core.loggers.console import ConsoleLoggerConfig
from rlinf_core.lora.config import LoraConfig
from rlinf_core.rollout.config import RolloutSettings
from rlinf_core.training.recipes import ConstantConfig, HfCosineConfig, MuonConfig, WsdConfig
from rlinf_core.training.settings import Fsdp2Settings
from rlinf_plugins_gymnasium.config import GymnasiumConfig
from rlinf_plugins_metaworld.config import MetaworldConfig
from rlinf_plugins_openpi import Pi0Config, Pi05Config
from rlinf_plugins_openpi.datasets.aloha import AlohaRobotwinConfig
from rlinf_plugins_openpi.datasets.config import OpenpiDatasetConfig
from rlinf_plugins_openpi.lora.config import OpenpiLoraConfig
from rlinf_plugins_openpi.settings import OpenpiSettings
from rlinf_plugins_text import TextDatasetConfig, TextPolicyConfig
from rlinf_plugins_text.settings import TextPolicySettings
from rlinf_plugins_trackers.config import TRACKERS, TensorBoardConfig, TrackerConfig

PAGE = Path(__file__).with_name("settings.md")
HEAD = """\
# Settings

Every key of a run's config. Written by `docs/render_settings.py` from the classes that validate the config: change a
field's docstring there, not this page. [training.md](training.md) explains how the keys work together.

A key that is not listed is refused, unless the class of a plugin's dataset, policy or trainer adds it. A default here
is overridden by the policy's, then the dataset's own defaults, then the TOML file, then `key=value` arguments.
"""


class Part(NamedTuple):
    """A table of the page."""

    heading: str
    about: str
    models: Sequence[type[BaseModel]]
    """Classes whose own fields are listed, in this order; the last is the one that validates."""
    without: Sequence[type[BaseModel]] = ()
    """Classes that redeclare some of these fields: those are listed there."""


def _toml(value: Any) -> str:
    """A value on one line, as one writes it in the config."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {_toml(inner)}" for key, inner in value.items()) + " }" if value else "{}"
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    return write_toml({"value": value}).removeprefix("value = ").strip()


def _choices(key: str, choices: Sequence[Sequence[type[BaseModel]]]) -> Iterator[Part]:
    """A part for each value that a key of `[optim]` can have."""
    for models in choices:
        name = _toml(models[-1].model_fields[key].default)
        yield Part(f"`[optim]` with `{key} = {name}`", str(models[-1].__doc__), models)


PARTS = (
    Part("The run", "Above the first table of the file.", [RunConfig]),
    Part("`[cluster]`", "Read by `rlinf launch`; a run that torchrun starts is held to it.", [ClusterConfig]),
    Part("`[cluster.slurm]`", 'Read by `rlinf launch` with `cluster.launcher = "slurm"`.', [SlurmConfig]),
    Part("`[runner]`", "How long to run, what to write and when.", [RunnerConfig]),
    Part(
        "`[data]`",
        "Of every dataset in LeRobot's layout. `config_name` must be set: it chooses the class and its defaults.",
        [DatasetConfig, LeRobotDatasetConfig],
    ),
    Part(
        "`[[data.mixture]]`",
        "Several datasets instead of `data.config_name`. An entry takes all keys of `[data]` but `num_workers`, and "
        "these; see [mixtures.md](mixtures.md).",
        [MixtureShare],
    ),
    Part("`[data]` of the formats for π0 and π0.5", "Besides the keys above.", [OpenpiDatasetConfig]),
    Part(
        "`[data]` of `pi0_aloha_robotwin` and `pi05_aloha_robotwin`",
        "Besides the keys above. [datasets.md](datasets.md) has the defaults of every format.",
        [AlohaRobotwinConfig],
        without=[LeRobotDatasetConfig, OpenpiDatasetConfig],
    ),
    Part("`[policy]`", "Of every policy.", [PolicyConfig]),
    Part(
        "`[policy]` of `pi0` and `pi05`",
        "Besides the keys above.",
        [OpenpiSettings],
        without=[Pi0Config, Pi05Config],
    ),
    Part("`[policy.lora]`", "Of every policy: [LoRA](lora.md). An empty table switches it on.", [LoraConfig]),
    Part("`[policy.lora]` of `pi0` and `pi05`", "Besides the keys above.", [OpenpiLoraConfig]),
    Part("`[policy]` of `pi0`", "Besides the keys above.", [Pi0Config]),
    Part("`[policy]` of `pi05`", "Besides the keys above.", [Pi05Config]),
    Part(
        "`random_erasing` in `policy.augmentations`",
        'An entry of the list: `{ type = "random_erasing", ... }`; see [augmentation.md](augmentation.md).',
        [RandomErasingConfig],
    ),
    Part(
        "`[data]` of `text`",
        "Of [text](text.md), which knows of core's keys `config_name`, `revision` and `num_workers` besides these.",
        [TextDatasetConfig],
    ),
    Part("`[policy]` of `text`", "Of [text](text.md).", [TextPolicySettings, TextPolicyConfig]),
    Part(
        "`[evaluators.<type>]`",
        "Of the [evaluators](training.md#evaluators) in `runner.evaluators`, and of `held_out`; each may add keys. For "
        "`text_answers`, `weights` is `current` by default.",
        [EvaluatorConfig],
        without=[HeldOutConfig],
    ),
    Part(
        "`[evaluators.simulator]`",
        "Of the evaluator that plays the policy in a [simulator](simulators.md), and of `rlinf eval --set`.",
        [RolloutSettings, SimulatorConfig],
    ),
    Part(
        "`env` in `[evaluators.simulator]`",
        "Of every environment; `type` chooses it. [MetaWorld](simulators.md#metaworld) and "
        "[Gymnasium](simulators.md#gymnasium) have keys of their own.",
        [EnvironmentConfig],
    ),
    Part("`env` of `metaworld`", "Of the [50 tasks of MetaWorld](simulators.md#metaworld).", [MetaworldConfig]),
    Part("`env` of `gymnasium`", "Of [environments of Gymnasium](simulators.md#gymnasium).", [GymnasiumConfig]),
    Part(
        "`[optim]`",
        "Of every optimizer and every schedule; `type` and `schedule` choose one of each, which bring the keys below. "
        "[training.md](training.md#optimizers-and-schedules) compares them.",
        [OptimizerConfig, ScheduleConfig, OptimConfig],
    ),
    *_choices("type", ([AdamWConfig], [MuonConfig])),
    *_choices(
        "schedule",
        (
            [WarmupConfig, DecayConfig, CosineConfig],
            [WarmupConfig, ConstantConfig],
            [WarmupConfig, DecayConfig, HfCosineConfig],
            [WarmupConfig, DecayConfig, WsdConfig],
        ),
    ),
    Part("`[trainer]`", "Of the trainer `fsdp2`.", [TrainerConfig, Fsdp2Settings]),
    Part("`[loggers.console]`", "Of the [console](loggers.md#console), which always runs.", [ConsoleLoggerConfig]),
    Part(
        "`[loggers.tensorboard]`",
        "Of the logger of [rlinf-plugins-trackers](loggers.md#trackers), if `runner.loggers` names it.",
        [TrackerConfig, TensorBoardConfig],
    ),
    *(
        Part(f"`[loggers.{name}]`", "Besides `close_timeout`, as above.", [tracker])
        for name, tracker in TRACKERS.items()
        if tracker is not TensorBoardConfig
    ),
)


def render() -> str:
    """The page's text."""
    return "\n".join([HEAD, *(line for part in PARTS for line in _part(part))])


def _part(part: Part) -> Iterator[str]:
    yield from (f"## {part.heading}", "", part.about)
    model = part.models[-1]
    if sets := [f"`{key} = {value}`" for key, value in _run_defaults(model)]:
        yield from ("", f"It sets defaults of the run: {', '.join(sets)}.")
    yield from ("", "| key | type | default | meaning |", "|---|---|---|---|")
    redeclared = {name for other in part.without for name in vars(other).get("__annotations__", {})}
    names = dict.fromkeys(name for cls in part.models for name in vars(cls).get("__annotations__", {}))
    for name in names:
        if name in model.model_fields and name not in redeclared and not _is_table(model.model_fields[name]):
            info = model.model_fields[name]
            cells = [f"`{name}`", _type(info.annotation, info.metadata), _default(info), _meaning(model, name)]
            yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
    yield ""


def _run_defaults(model: type[BaseModel]) -> Iterator[tuple[str, str]]:
    """What the class itself sets for the run, as dotted keys."""
    for section, table in vars(model).get("run_defaults", {}).items():
        for key, value in table.items():
            yield dotted((section, key)), _toml(value)


def _is_table(info: FieldInfo) -> bool:
    """Whether a field of the run is a table of its own, with a part of its own here."""
    is_model = isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel)
    return is_model and info.annotation is not EnvironmentConfig  # A key that chooses the class of its table.


def _type(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """A type in words: `integer ≥ 1`, `"auto"` or `"cpu"`, list of strings."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " or ".join(f"`{_toml(choice)}`" for choice in arguments)
    if origin is Annotated:
        return _type(arguments[0], arguments[1:])
    if origin in (Union, UnionType):  # None is what a key has that is not set.
        return " or ".join(_type(one) for one in arguments if one is not NoneType)
    if origin is tuple:
        kind = _plural(arguments[0])
        return f"list of {kind}" if ... in arguments else f"list of {len(arguments)} {kind}"
    if origin is dict:
        plural = _plural(arguments[1])
        return plural if plural.startswith("tables") else f"table of {plural}"
    if annotation is EnvironmentConfig:
        return "name or table"
    if issubclass(annotation, BaseModel):
        return f"table of {_keys(annotation)}"
    limits = [
        f"{sign} {_bound(getattr(one, name))}"
        for one in metadata
        for name, sign in _SIGNS.items()
        if hasattr(one, name)
    ]
    return f"{_PLAIN[annotation].one} {', '.join(limits)}".strip()


def _plural(annotation: Any) -> str:
    """Several of a type: `integers`, `integers or strings`."""
    if get_origin(annotation) is Annotated:
        return _plural(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return " or ".join(map(_plural, get_args(annotation)))
    if get_origin(annotation) is Literal:
        return _type(annotation)
    if annotation in _PLAIN:
        return _PLAIN[annotation].plural
    if get_origin(annotation) is Literal:
        return _type(annotation)
    if annotation is Any:
        return "any values"
    if annotation is AugmentationConfig:
        return "names or tables"
    is_base = set(annotation.model_fields) <= {"type"}  # Of classes that plugins register.
    return "tables" if is_base else f"tables of {_keys(annotation)}"


def _keys(model: type[BaseModel]) -> str:
    return ", ".join(f"`{name}`" for name in model.model_fields)


class _Plain(NamedTuple):
    """A type in words."""

    one: str
    plural: str


_PLAIN = {
    bool: _Plain("true or false", "true or false"),
    int: _Plain("integer", "integers"),
    float: _Plain("number", "numbers"),
    str: _Plain("string", "strings"),
}
_SIGNS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def _bound(number: float) -> str:
    return "2⁶³" if number == 2**63 else f"{number:g}"


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return "required"
    default = info.get_default(call_default_factory=True)
    return "none" if default is None else f"`{_toml(default)}`"


def _meaning(model: type[BaseModel], name: str) -> str:
    """The field's docstring, or the one it inherits.

    Raises:
        LookupError: Nobody says what the key means.
    """
    for cls in model.__mro__:
        info = vars(cls).get("__pydantic_fields__", {}).get(name)
        if info and info.description:
            return " ".join(info.description.split())
    raise LookupError(f"{model.__name__}.{name} has no docstring")


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
