"""From a TOML file and `key=value` overrides to a validated, frozen `RunConfig`.

Layers, each over the one before (contract 6): core's defaults < the policy's `run_defaults` < the dataset's
`run_defaults` < the TOML file < the command line. Which classes validate `[data]`, `[policy]` and `[trainer]` follows
from `data.config_name`, `policy.type` and `trainer.type`. All mistakes are reported together.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError, create_model
from pydantic_core import ErrorDetails

from rlinf_core.config.mistakes import COMMAND_LINE, Layer, explain, is_model, mistake, value_at
from rlinf_core.config.run import RunConfig, Section
from rlinf_core.config.toml import Table, diff_tables, merge, parse_override, read_toml, write_toml
from rlinf_core.datasets import DatasetConfig
from rlinf_core.errors import UserError
from rlinf_core.plugins import Plugins, get_plugins

__all__ = ["diff_tables", "dump_config", "load_config", "read_toml"]

_CORE_DEFAULTS: Table = {"trainer": {"type": "fsdp2"}}


def load_config(
    path: str | os.PathLike[str], overrides: Sequence[str] = (), plugins: Plugins | None = None
) -> RunConfig:
    """Load and validate the config of a run. Leaves torch unloaded.

    Args:
        path: A TOML file. Relative paths in it are relative to the current directory, not to the file.
        overrides: `section.key=value`, over the file; see `config.toml.parse_override`.
        plugins: Where dataset, policy and trainer classes come from; default: the plugins of the environment.

    Raises:
        UserError: One message that names every mistake.
    """
    draft = _Draft(Path(path), overrides, plugins or get_plugins())
    draft.choose_classes()
    return draft.validate()


def dump_config(run: RunConfig) -> str:
    """TOML text of a whole config; `load_config` makes an equal config of it."""
    return write_toml(_table(run))


def _table(run: RunConfig) -> Table:
    # TOML has no null, so None is left out; no field has another default and accepts None (contract 6).
    return run.model_dump(mode="json", exclude_none=True, round_trip=True)


class _Draft:
    """A config on its way to a `RunConfig`, with the mistakes found so far."""

    def __init__(self, path: Path, overrides: Sequence[str], plugins: Plugins) -> None:
        self._path, self._plugins = path, plugins
        self._mistakes: list[str] = []
        given: Table = {}
        for override in overrides:
            try:
                given = merge(given, parse_override(override))
            except UserError as error:
                self._mistakes.append(f"{error} [{COMMAND_LINE}]")
        self._layers = [Layer(str(path), read_toml(path)), Layer(COMMAND_LINE, given)]
        """Lowest first."""
        self._classes: dict[str, type[BaseModel] | None] = {}
        """The classes of the tables that plugins define; None where it could not be told."""

    def choose_classes(self) -> None:
        """Find the classes of the tables, and lay their defaults below what the user wrote."""
        data = self._choose(("data", "config_name"), self._plugins.dataset, "is required: a name from `rlinf datasets`")
        fits = not data or self._check_policy_fits(data)
        if data:
            self._lay_below(f"defaults of dataset {self._get('data', 'config_name')!r}", data.run_defaults)
        policy = None
        if fits and (data or self._get("policy", "type")):
            policy = self._choose(("policy", "type"), self._plugins.policy, "is required: the dataset does not set it")
        if policy:
            self._lay_below(f"defaults of policy {self._get('policy', 'type')!r}", policy.run_defaults)
        self._lay_below("core's defaults", _CORE_DEFAULTS)
        trainer = self._choose(("trainer", "type"), self._plugins.trainer, "is required")
        self._classes = {"data": data, "policy": policy, "trainer": trainer}
        self._check_loggers()

    def validate(self) -> RunConfig:
        """Validate every table with its class, and then what holds between tables."""
        fields: dict[str, Any] = {
            name: (self._classes.get(name, info.annotation), info) for name, info in RunConfig.model_fields.items()
        }
        fields |= {name: (Any, None) for name, cls in self._classes.items() if cls is None}
        # Apart from RunConfig itself, whose own checks need all tables to be of their classes.
        tables = self._try(create_model("RunTables", __base__=Section, **fields), self._merged)
        run = self._try(RunConfig, dict(tables)) if tables and not self._mistakes else None
        if run is None:
            count = f"{len(self._mistakes)} mistake{'s' if len(self._mistakes) > 1 else ''}"
            lines = "".join(f"\n  {text.replace(chr(10), chr(10) + '  ')}" for text in self._mistakes)
            raise UserError(f"{self._path}: {count} in the config:{lines}")
        return run

    def _try[M: BaseModel](self, model: type[M], values: Mapping[str, Any]) -> M | None:
        try:
            return model.model_validate(values)
        except ValidationError as error:
            found = [one for one in error.errors(include_url=False) if not self._follows(one)]
            self._mistakes += [explain(one, self._layers, self._models()) for one in found]
            return None

    def _models(self) -> dict[str, type[BaseModel]]:
        """The classes that are known, by table; `""` is the whole."""
        known: dict[str, Any] = {name: info.annotation for name, info in RunConfig.model_fields.items()} | self._classes
        return {"": RunConfig} | {name: cls for name, cls in known.items() if is_model(cls)}

    def _follows(self, error: ErrorDetails) -> bool:
        """Whether a mistake may follow only from defaults that are missing because a class could not be told."""
        where = error["loc"][:-1] if error["type"] == "missing" else error["loc"]
        inside_table = isinstance(value_at(self._merged, where), dict | None)
        by_default = error["type"] in ("missing", "value_error", "assertion_error")
        return None in self._classes.values() and by_default and inside_table

    def _choose[C](self, place: tuple[str, str], look_up: Callable[[str], type[C]], missing: str) -> type[C] | None:
        name = self._get(*place)
        try:
            if isinstance(name, str) and name:
                return look_up(name)
            self._note(place, missing if name in (None, "") else f"must be a name, not {name!r}")
        except UserError as error:
            self._note(place, str(error))
        return None

    def _check_policy_fits(self, data: type[DatasetConfig]) -> bool:
        own = value_at(data.run_defaults, ("policy", "type"))
        fitting = [type_ for type_ in (own, *data.compatible_policies) if type_]
        given = self._get("policy", "type")
        if given is None or not fitting or given in fitting:
            return True
        name = self._get("data", "config_name")
        self._note(("policy", "type"), f"{given!r} does not fit dataset {name!r}, which is for {' or '.join(fitting)}")
        return False

    def _check_loggers(self) -> None:
        names = self._get("runner", "loggers")
        for name in names if isinstance(names, list) else ():
            try:
                if isinstance(name, str):
                    self._plugins.logger(name)
            except UserError as error:
                self._note(("runner", "loggers"), str(error))

    def _note(self, place: tuple[str, ...], what: str) -> None:
        self._mistakes.append(mistake(place, what, self._layers))

    def _lay_below(self, origin: str, table: Mapping[str, Any]) -> None:
        self._layers.insert(0, Layer(origin, table))

    def _get(self, *place: str) -> Any:
        return value_at(self._merged, place)

    @property
    def _merged(self) -> Table:
        return reduce(merge, (layer.table for layer in self._layers), {})
