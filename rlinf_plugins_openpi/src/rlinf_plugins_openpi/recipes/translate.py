"""A recipe of RLinf as the tables of a config, with everything that is to be said about it.

By default a config does what RLinf's code does with the recipe, also where that is not what the recipe seems to say.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError

from rlinf_core import UserError
from rlinf_core.contract.tables.cluster import ClusterConfig
from rlinf_core.contract.tables.runner import RunnerConfig
from rlinf_plugins_openpi.datasets.config import OpenpiDatasetConfig
from rlinf_plugins_openpi.recipes import questions
from rlinf_plugins_openpi.recipes.formats import find_format
from rlinf_plugins_openpi.recipes.hydra_files import RecipeFile
from rlinf_plugins_openpi.recipes.keys import NOT_HERE, reason
from rlinf_plugins_openpi.recipes.model_tables import is_port, read_data, read_policy
from rlinf_plugins_openpi.recipes.run_tables import read_cluster, read_runner, read_trainer
from rlinf_plugins_openpi.recipes.schedule import read_optim
from rlinf_plugins_openpi.recipes.values import Values

MODELS = ("openpi", "openpi_rlinf")
REQUIRED = (
    "actor.model.model_type",
    "actor.model.model_path",
    "actor.model.openpi.config_name",
    "actor.optim.lr",
    "actor.optim.adam_beta1",
    "actor.optim.adam_beta2",
    "actor.optim.clip_grad",
)
ALWAYS = (
    "RLinf keeps no moving average of the weights in fine-tuning, although openpi does (0.99): optim.ema_decay = 0",
    "the loss runs over all 32 padded numbers of an action, in RLinf and in the config; policy.mask_padded_dims leaves "
    "the padding out",
)
"""Said of every recipe."""


@dataclass(frozen=True)
class Imported:
    """A config, and what was said of the import."""

    tables: Mapping[str, Any]
    """The config; TOML can express all values."""
    warnings: tuple[str, ...]
    """What differs from RLinf, or from what the recipe seems to say."""
    unused: Mapping[str, str]
    """Keys of the recipe without a counterpart -> the reason."""


def translate(recipe: RecipeFile, loggers: Mapping[str, Any], *, as_intended: bool = False) -> Imported:
    """Translate a recipe.

    Args:
        recipe: The recipe, composed.
        loggers: The loggers of the installed packages: type -> the names of its fields.
        as_intended: Write what the recipe's author meant where RLinf's code does not do it.

    Raises:
        UserError: One message that names everything with which the recipe cannot be imported.
    """
    values = Values(recipe.leaves)
    if questions.is_about_questions(values):
        return _translate_questions(recipe, values, loggers, as_intended=as_intended)
    _check_model(recipe, values)
    values.required(*REQUIRED)
    name = values.text("actor.model.openpi.config_name") or ""
    cls, why = find_format(name) if name else (None, "")
    if why:
        values.refuse("actor.model.openpi.config_name", why)
    port = is_port(values)
    tables: dict[str, Any] = {"seed": values.integer("actor.seed", 42, least=0)}
    tables["cluster"] = read_cluster(values)
    tables["runner"], loggers_tables = read_runner(values, loggers)
    if cls is not None:
        tables["data"] = read_data(values, name, cls, port=port)
        tables["policy"] = read_policy(values, cls, port=port, as_intended=as_intended)
    tables["optim"] = read_optim(values, tables["runner"].get("max_steps"), as_intended=as_intended)
    tables["trainer"] = read_trainer(values, port=port, as_intended=as_intended)
    if loggers_tables:
        tables["loggers"] = loggers_tables
    if cls is not None:  # Without a format, most keys have not been looked at.
        values.finish()
    if not values.problems and cls is not None:
        _check_tables(values, tables, cls)
    _refuse_problems(recipe, values)
    return Imported(tables, (*values.warnings, *ALWAYS), values.unused)


def _translate_questions(
    recipe: RecipeFile, values: Values, loggers: Mapping[str, Any], *, as_intended: bool
) -> Imported:
    """A recipe for a vision-language model on questions with images."""
    values.required(*questions.REQUIRED)
    tables: dict[str, Any] = {"seed": values.integer("actor.seed", 42, least=0), "cluster": read_cluster(values)}
    tables["runner"], loggers_tables = read_runner(values, loggers, validates=True)
    tables["runner"] |= questions.read_validation(values)
    tables["data"] = questions.read_questions(values)
    tables["policy"] = questions.read_model(values)
    tables["optim"] = read_optim(values, tables["runner"].get("max_steps"), as_intended=as_intended)
    tables["trainer"] = read_trainer(values, port=True, as_intended=as_intended)
    if loggers_tables:
        tables["loggers"] = loggers_tables
    if tables["runner"]["val_check_interval"] and "validation_files" not in tables["data"]:
        tables["runner"]["val_check_interval"] = 0
        values.warn("the recipe names no data.val_data_paths: set data.validation_fraction to validate")
    values.finish(questions.NOT_NEEDED, "a vision-language model")
    _refuse_problems(recipe, values)
    return Imported(tables, (*values.warnings, *questions.ALWAYS), values.unused)


def _refuse_problems(recipe: RecipeFile, values: Values) -> None:
    if values.problems:
        listed = "\n".join(f"  {problem}" for problem in dict.fromkeys(values.problems))
        raise UserError(f"{recipe.path} cannot be imported:\n{listed}")


def _check_tables(values: Values, tables: Mapping[str, Any], cls: type[OpenpiDatasetConfig]) -> None:
    """What the config's own classes would refuse: a mask that is wider than the action, a missing fact of a format."""
    data = tables["data"]
    entries = [{key: one[key] for key in one if key != "weight"} for one in data.get("mixture", [data])]
    checked: list[tuple[str, type[BaseModel], Mapping[str, Any]]] = [("data", cls, entry) for entry in entries[:1]]
    checked += [("cluster", ClusterConfig, tables["cluster"]), ("runner", RunnerConfig, tables["runner"])]
    for table, model, given in checked:
        try:
            model.model_validate(given)
        except ValidationError as error:
            for one in error.errors():
                place = ".".join(map(str, (table, *one["loc"])))
                values.refuse(f"the config's {place}", one["msg"].removeprefix("Value error, "))


def _check_model(recipe: RecipeFile, values: Values) -> None:
    """Refuse recipes of other models at once, with the keys that have no counterpart and why."""
    model = values.peek_text("actor.model.model_type")
    if model in MODELS or (model is None and not any(reason(key, NOT_HERE) for key in values.given)):
        return
    telling = sorted({text for key in values.given if (text := reason(key, NOT_HERE))})
    because = "".join(f"\n  {', '.join(_keys_of(values, text))}: {text}" for text in telling)
    raise UserError(
        f"{recipe.path} is a recipe for {model or 'another model'}; only those for π0 and π0.5 (model_type openpi or "
        f"openpi_rlinf), and for {' and '.join(questions.MODELS)} with training_backend fsdp, can be imported. Text "
        f"models are fine-tuned with rlinf-plugins-text{because}"
    )


def _keys_of(values: Values, text: str) -> list[str]:
    return sorted(key for key in values.given if reason(key, NOT_HERE) == text)
