"""Load a TOML file and `key=value` overrides into a validated, frozen `RunConfig`.

Layers, each overriding the one before (contract 6): core's defaults < the policy's `run_defaults` < the dataset's
`run_defaults` < the TOML file < the command line. `data.config_name`, `policy.type` and `trainer.type` select the
classes that validate `[data]`, `[policy]` and `[trainer]`; `[plugins.<name>]` is validated by the class that a plugin
registered under that name. All mistakes are reported together.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial, reduce
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ValidationError, create_model
from pydantic_core import ErrorDetails

from rlinf_core.config import mixture
from rlinf_core.config.mistakes import COMMAND_LINE, KeyPath, Layer, Tables, explain, is_model, mistake, value_at
from rlinf_core.config.toml import (
    Table,
    diff_tables,
    dotted,
    is_list_of_tables,
    leaves,
    merge,
    parse_override,
    read_toml,
    typed_values,
    write_toml,
)
from rlinf_core.contract.augmentation import PLUGINS
from rlinf_core.contract.datasets import DatasetConfig
from rlinf_core.contract.mixture import LOADER_KEYS, MixtureConfig, MixtureEntry, MixtureShare
from rlinf_core.contract.run import RunConfig
from rlinf_core.contract.tables import Section
from rlinf_core.errors import UserError
from rlinf_core.plugins.owners import Owner
from rlinf_core.plugins.registrations import RegistrationKind
from rlinf_core.plugins.registry import Plugins, get_plugins
from rlinf_core.untrusted import without_secrets

__all__ = ["diff_tables", "dump_config", "load_config", "read_toml"]

_MIXTURE = ("data", "mixture")
_POLICY = ("policy", "type")
SECRET = (
    "contains a password or a token, which would be written to the run's folder: leave it out; the hub's client reads "
    "HF_TOKEN or the login of `hf auth login`, and loggers have their own environment variables"
)
_CORE_DEFAULTS: Table = {"trainer": {"type": "fsdp2"}}


def load_config(
    path: str | os.PathLike[str], overrides: Sequence[str] = (), plugins: Plugins | None = None
) -> RunConfig:
    """Load and validate the config of a run. Leaves torch unloaded.

    Args:
        path: A TOML file. Relative paths in it are relative to the current directory, not to the file.
        overrides: `section.key=value`, which override the file; see `config.toml.parse_override`.
        plugins: Source of the dataset, policy and trainer classes; default: the plugins of the environment.

    Raises:
        UserError: One message that names every mistake.
    """
    plugins = plugins or get_plugins()
    plugins.raise_if_strict()
    draft = _Draft(Path(path), overrides, plugins)
    draft.choose_classes()
    return draft.validate()


def dump_config(run: RunConfig) -> str:
    """TOML text of a whole config, from which `load_config` loads an equal config."""
    return write_toml(_table(run))


def _table(run: RunConfig) -> Table:
    # TOML has no null, so None is left out; no field that accepts None has another default (contract 6).
    return run.model_dump(mode="json", exclude_none=True, round_trip=True)


def _flat(value: Any) -> Iterator[Any]:
    """The values in nested lists and tables, or the value itself."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if not isinstance(value, list | tuple):
        yield value
        return
    for one in value:
        yield from _flat(one)


class _Chosen(NamedTuple):
    """The class of a table, and the plugin it comes from."""

    model: type[Any]
    owner: Owner


class _Draft:
    """A config on its way to a `RunConfig`, with the mistakes found so far."""

    def __init__(self, path: Path, overrides: Sequence[str], plugins: Plugins) -> None:
        self._path, self._plugins = path, plugins
        self._mistakes: list[str] = []
        given: Table = {}
        typed: dict[tuple[str, ...], str] = {}
        for override in overrides:
            try:
                given = merge(given, table := parse_override(override))
                typed |= {tuple(map(str, key)): override.partition("=")[2].strip() for key, _ in leaves(table)}
            except UserError as error:
                self._mistakes.append(f"{error} [{COMMAND_LINE}]")
        self._layers = [Layer(str(path), read_toml(path), typed_values(path)), Layer(COMMAND_LINE, given, typed)]
        """Lowest first."""
        self._chosen: dict[KeyPath, _Chosen | None] = {}
        """The classes of the tables that plugins define, by key path; None if it could not be determined."""

    def choose_classes(self) -> None:
        """Find the classes of the tables, and add their defaults below the user's layers."""
        datasets = self._choose_datasets()
        found = {place: chosen.model for place, chosen in datasets.items() if chosen}
        fits = not [place for place, model in found.items() if not self._check_policy_fits(place, model)]
        agree = self._add_dataset_defaults(found)
        policy = None
        if fits and agree and (found or self._get("policy", "type")):
            missing = "is required: the dataset does not set it"
            policy = self._choose(_POLICY, partial(self._find, "policy"), missing)
        if policy:
            self._add_below(f"defaults of policy {self._get('policy', 'type')!r}", policy.model.run_defaults)
        self._add_below("core's defaults", _CORE_DEFAULTS)
        trainer = self._choose(("trainer", "type"), partial(self._find, "trainer"), "is required")
        self._chosen = {**datasets, ("policy",): policy, ("trainer",): trainer}
        self._check_loggers()
        self._choose_options()

    def validate(self) -> RunConfig:
        """Validate every table with its class, then the rules between tables."""
        self._refuse_secrets()
        fields: dict[str, Any] = {name: (info.annotation, info) for name, info in RunConfig.model_fields.items()}
        fields |= {str(place[0]): (Any, None) for place in (*self._chosen, ("plugins",))}
        # Tables are validated one by one, so that a failing validator is attributed to the right plugin. RunConfig
        # comes last, because its own checks need every table to be an instance of its class.
        core = self._try(create_model("RunTables", __base__=Section, **fields), self._merged)
        tables = dict(core) if core else {}
        tables["plugins"] = {}
        if self._mixture():
            tables["data"] = self._validate_mixture()
        for place, chosen in self._chosen.items():
            if chosen and place[:2] != _MIXTURE:
                above = tables["plugins"] if len(place) > 1 else tables
                above[str(place[-1])] = self._try(chosen.model, self._get(*place), place, chosen.owner)
        run = None if self._mistakes else self._try(RunConfig, tables)
        if run is None:
            count = f"{len(self._mistakes)} mistake{'s' if len(self._mistakes) > 1 else ''}"
            lines = "".join(f"\n  {text.replace(chr(10), chr(10) + '  ')}" for text in self._mistakes)
            raise UserError(f"{self._path}: {count} in the config:{lines}")
        return run

    def _refuse_secrets(self) -> None:
        """Report passwords and tokens: the config is written to the run's folder, where they do not belong."""
        for place, value in leaves(self._merged):
            if any(isinstance(one, str) and without_secrets(one) != one for one in _flat(value)):
                self._note(place, SECRET)

    def _validate_mixture(self) -> MixtureConfig | None:
        """Validate the entries of `[[data.mixture]]`, each with its own class, and the keys beside them."""
        entries, own = self._mixture(), MixtureShare.model_fields
        made: list[MixtureEntry] = []
        for number, (entry, name) in enumerate(zip(entries, mixture.name_sources(entries), strict=True)):
            place = (*_MIXTURE, number)
            share = self._try(MixtureShare, {"name": name} | {key: entry[key] for key in own if key in entry}, place)
            table = {key: value for key, value in entry.items() if key not in (*own, *LOADER_KEYS)}
            chosen = self._chosen[place]
            data = self._try(chosen.model, table, place, chosen.owner) if chosen else None
            if share and data:
                made.append(MixtureEntry(name=name, weight=share.weight, data=data))
        beside = {key: value for key, value in (self._get("data") or {}).items() if key in LOADER_KEYS}
        if self._try(DatasetConfig, beside, ("data",)) and len(made) == len(entries):
            return self._try(MixtureConfig, beside | {"mixture": made}, ("data",))
        return None

    def _try[M: BaseModel](
        self, model: type[M], values: Any, place: KeyPath = (), owner: Owner | None = None
    ) -> M | None:
        """Validate the table at a key path. Records mistakes; raises an exception of the class, noting its owner."""
        named = owner if len(place) > 1 else None
        try:
            return model.model_validate(values, context={PLUGINS: self._plugins})
        except ValidationError as error:
            for one in error.errors(include_url=False):
                one["loc"] = (*place, *one["loc"])
                if not self._follows(one):
                    self._mistakes.append(explain(one, self._layers, self._tables(), named))
        except UserError as error:
            self._mistakes.append(mistake(place, str(error), self._layers, self._get(*place), owner=named))
        except Exception as error:
            error.add_note(f"while {model.__qualname__} of {owner or 'rlinf-core'} validated [{dotted(place)}]")
            raise
        return None

    def _tables(self) -> Tables:
        """The fields of the tables whose classes are known, by key path."""
        known: dict[KeyPath, Any] = {(name,): info.annotation for name, info in RunConfig.model_fields.items()}
        known |= {place: chosen.model if chosen else None for place, chosen in self._chosen.items()}
        tables: Tables = {place: cls.model_fields for place, cls in known.items() if is_model(cls)}
        tables |= {place: {**MixtureShare.model_fields, **tables[place]} for place in tables if place[:2] == _MIXTURE}
        return {(): RunConfig.model_fields} | tables

    def _follows(self, error: ErrorDetails) -> bool:
        """Whether a mistake may only be caused by missing defaults of a class that could not be determined."""
        where = error["loc"][:-1] if error["type"] == "missing" else error["loc"]
        inside_table = isinstance(value_at(self._merged, where), dict | None)
        by_default = error["type"] in ("missing", "value_error", "assertion_error")
        return None in self._chosen.values() and by_default and inside_table

    def _mixture(self) -> list[Table]:
        """The entries of `[[data.mixture]]`; empty if it is not a list of tables."""
        entries = self._get(*_MIXTURE)
        return entries if is_list_of_tables(entries) else []

    def _choose_datasets(self) -> dict[KeyPath, _Chosen | None]:
        """The class of `[data]`, or of each entry of `[[data.mixture]]`, by key path."""
        missing = "is required: a name from `rlinf datasets`"
        if self._get(*_MIXTURE) is None:
            return {("data",): self._choose(("data", "config_name"), self._find_dataset, missing)}
        if not self._mixture():
            below = next(filter(is_list_of_tables, (value_at(one.table, _MIXTURE) for one in self._layers)), [])
            self._note(_MIXTURE, mixture.wrong_shape(self._get(*_MIXTURE), len(below)))
            return {("data",): None}
        for place, what in mixture.misplaced_keys(self._get("data")):
            self._note(("data", *place), what)
        chosen: dict[KeyPath, _Chosen | None] = {}
        for place in ((*_MIXTURE, number) for number in range(len(self._mixture()))):
            one = self._choose((*place, "config_name"), self._find_dataset, missing)
            if one and (taken := sorted(one.model.model_fields.keys() & MixtureShare.model_fields.keys())):
                self._note(place, f"{one.model.__name__} cannot be mixed: its key {taken[0]} is a key of the entry")
                one = None
            chosen[place] = one
        return chosen

    def _add_dataset_defaults(self, models: Mapping[KeyPath, type[DatasetConfig]]) -> bool:
        """Add the datasets' run defaults. Returns whether the policy is decided, by the datasets or by the user."""
        if ("data",) in models:
            origin = f"defaults of dataset {self._get('data', 'config_name')!r}"
            self._add_below(origin, models["data",].run_defaults)
        names = mixture.name_sources(self._mixture())
        common, differing = mixture.common_defaults(
            {names[int(place[-1])]: model.run_defaults for place, model in models.items() if place != ("data",)}
        )
        undecided = {place: said for place, said in differing.items() if self._get(*place) is None}
        for place, said in undecided.items():
            why = "a run trains one policy, but " if place == _POLICY else ""
            self._note(place, f"{why}the datasets of data.mixture set different values ({said}): set it for all")
        if common:
            self._add_below("defaults of the datasets of data.mixture", common)
        return _POLICY not in undecided

    def _choose(self, place: KeyPath, find: Callable[[str], _Chosen], missing: str) -> _Chosen | None:
        name = self._get(*place)
        try:
            if isinstance(name, str) and name:
                return find(name)
            self._note(place, missing if name in (None, "") else f"must be a name, not {name!r}")
        except UserError as error:
            self._note(place, str(error))
        return None

    def _find(self, kind: RegistrationKind, name: str) -> _Chosen:
        found = self._plugins.find(kind, name)
        return _Chosen(found.item, found.owner)

    def _find_dataset(self, name: str) -> _Chosen:
        entry = self._plugins.find_dataset(name)
        return _Chosen(entry.load(), entry.owner)

    def _choose_options(self) -> None:
        """Find the class of each `[plugins.<name>]` table."""
        tables = self._get("plugins")
        if tables is not None and not isinstance(tables, Mapping):
            self._note(("plugins",), f"must have one table per plugin, [plugins.<name>] (got {tables!r})")
            return
        for name in tables or ():
            try:
                self._chosen["plugins", name] = self._find("options", name)
            except UserError as error:
                self._note(("plugins", name), str(error))

    def _check_policy_fits(self, place: KeyPath, data: type[DatasetConfig]) -> bool:
        own = value_at(data.run_defaults, ("policy", "type"))
        fitting = [type_ for type_ in (own, *data.compatible_policies) if type_]
        given = self._get(*_POLICY)
        if given is None or not fitting or given in fitting:
            return True
        name = self._get(*place, "config_name")
        instead = self._plugins.instead_of(given) if isinstance(given, str) else ""
        self._note(
            _POLICY,
            f"{given!r} is not compatible with dataset {name!r}, which is for {' or '.join(fitting)}"
            + (f": {instead}" if instead else ""),
        )
        return False

    def _check_loggers(self) -> None:
        names = self._get("runner", "loggers")
        for name in names if isinstance(names, list) else ():
            try:
                if isinstance(name, str):
                    self._plugins.logger(name)
            except UserError as error:
                self._note(("runner", "loggers"), str(error))

    def _note(self, place: KeyPath, what: str) -> None:
        self._mistakes.append(mistake(place, what, self._layers))

    def _add_below(self, origin: str, table: Mapping[str, Any]) -> None:
        self._layers.insert(0, Layer(origin, table))

    def _get(self, *place: str | int) -> Any:
        return value_at(self._merged, place)

    @property
    def _merged(self) -> Table:
        return reduce(merge, (layer.table for layer in self._layers), {})
