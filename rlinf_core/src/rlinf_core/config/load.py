"""Load a TOML file and `key=value` overrides into a validated, frozen `RunConfig`.

Layers, each overriding the one before (contract 6): core's defaults < the policy's `run_defaults` < the dataset's
`run_defaults` < the TOML file < the command line. `data.config_name`, `policy.type` and `trainer.type` select the
classes that validate `[data]`, `[policy]` and `[trainer]`; `optim.type` and `optim.schedule` together that of
`[optim]`; `[plugins.<name>]`, `[loggers.<type>]` and `[evaluators.<type>]` are validated by the classes that are
registered under these names. All mistakes are reported together.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial, reduce
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ValidationError, create_model
from pydantic_core import ErrorDetails

from rlinf_core.config import mixture
from rlinf_core.config import optim as optim_keys
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
from rlinf_core.contract.datasets import DatasetConfig
from rlinf_core.contract.optim import compose, shared_names
from rlinf_core.contract.registered import PLUGINS
from rlinf_core.contract.run import NOTHING_HELD_OUT, RunConfig
from rlinf_core.contract.tables.mixture import LOADER_KEYS, MixtureConfig, MixtureEntry, MixtureShare
from rlinf_core.contract.tables.runner import Section
from rlinf_core.errors import PluginError, UserError
from rlinf_core.plugins.evaluators import ALWAYS_ON as HELD_OUT
from rlinf_core.plugins.owners import Owner, exited
from rlinf_core.plugins.registrations import RegistrationKind
from rlinf_core.plugins.registry import ALWAYS_ON, Plugins, get_plugins
from rlinf_core.untrusted.text import is_secret, without_secrets

__all__ = ["diff_tables", "dump_config", "load_config", "read_toml", "with_begun"]

_MIXTURE = ("data", "mixture")
_POLICY = ("policy", "type")
SECRET = (
    "contains a password or a token, which would be written to the run's folder: leave it out; the hub's client reads "
    "HF_TOKEN or the login of `hf auth login`, and loggers have their own environment variables"
)
NAMED = {
    "plugins": "plugin, [plugins.<name>]",
    "loggers": "logger, [loggers.<type>]",
    "evaluators": "evaluator, [evaluators.<type>]",
}
"""Sections with a table for each name, whose class is the one registered under that name, and what they consist of."""
TYPED = ("loggers", "evaluators")
"""Those of `NAMED` whose classes have their table's name as `type`."""
_CORE_DEFAULTS: Table = {"trainer": {"type": "fsdp2"}}
_OPTIM_DEFAULTS: Table = {"type": "adamw", "schedule": "cosine"}


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


def load_saved_config(folder: Path, plugins: Plugins) -> RunConfig:
    """Load the config of a run from its folder, to read what it has trained. Leaves torch unloaded.

    Loggers and evaluators are left out: they only matter to a run that goes on, and a simulator or tracker that it was
    trained beside need not be installed where its policy is exported or acts.

    Args:
        folder: The run's folder, `runs/<name>`.
        plugins: Source of the dataset, policy and trainer classes.

    Raises:
        UserError: One message that names every mistake.
    """
    plugins.raise_if_strict()
    draft = _Draft(folder / "config.toml", (), plugins)
    draft.choose_classes(running=False)
    return draft.validate(running=False)


def find_tables(path: str | os.PathLike[str], overrides: Sequence[str] = (), plugins: Plugins | None = None) -> Tables:
    """The fields of a config's tables by key path, for completion: of all whose class is known, whatever the mistakes.

    Raises:
        UserError: The file cannot be read.
    """
    draft = _Draft(Path(path), overrides, plugins or get_plugins())
    draft.choose_classes()
    return draft.tables()


def with_begun(run: RunConfig, *, replacing: bool = False) -> RunConfig:
    """The run with what its policy decides when a run begins, or decided then; see `PolicyConfig.begun`.

    Args:
        run: The run.
        replacing: The run replaces the one in its folder.

    Raises:
        UserError: A file of the policy cannot be read.
    """
    saved = run.folder / "config.toml"
    table: Any = None
    if saved.exists() and not replacing:
        try:
            table = read_toml(saved).get("policy")
        except UserError:  # `decide_start` reports it.
            table = None
    policy = run.policy.begun(table if isinstance(table, Mapping) else None)
    return run if policy is run.policy else run.model_copy(update={"policy": policy})


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
        self._undecided_optim: dict[str, str] = {}
        """Keys of `[optim]` for which datasets of a mixture set different values, and what to say of them."""

    def choose_classes(self, *, running: bool = True) -> None:
        """Find the classes of the tables, and add their defaults below the user's layers.

        Args:
            running: Also those of loggers and evaluators, which a run that only is read does not need.
        """
        datasets = self._choose_datasets()
        found = {place: chosen.model for place, chosen in datasets.items() if chosen}
        fits = not [place for place, model in found.items() if not self._check_policy_fits(place, model)]
        agree = self._add_dataset_defaults(found)
        policy = None
        if fits and agree and (found or self._get("policy", "type")):
            missing = "is required: the dataset does not set it"
            policy = self._choose(_POLICY, partial(self._find, "policy"), missing)
        if policy:
            origin = f"defaults of policy {self._get('policy', 'type')!r}"
            if isinstance(lora := self._get("policy", "lora"), Mapping):
                self._add_below(f"{origin} with LoRA", policy.model.lora_run_defaults(lora))
            self._add_below(origin, policy.model.run_defaults)
        self._add_below("core's defaults", _CORE_DEFAULTS)
        trainer = self._choose(("trainer", "type"), partial(self._find, "trainer"), "is required")
        self._chosen = {**datasets, ("policy",): policy, ("optim",): self._choose_optim(), ("trainer",): trainer}
        self._choose_named("plugins", "options")
        if running:
            self._choose_running("loggers", "logger", ALWAYS_ON)
            self._choose_running("evaluators", "evaluator", (HELD_OUT,))

    def validate(self, *, running: bool = True) -> RunConfig:
        """Validate every table with its class, then the rules between tables; see `choose_classes`."""
        self._refuse_secrets()
        fields: dict[str, Any] = {name: (info.annotation, info) for name, info in RunConfig.model_fields.items()}
        fields |= {str(place[0]): (Any, None) for place in (*self._chosen, *((name,) for name in NAMED))}
        # Tables are validated one by one, so that a failing validator is attributed to the right plugin. RunConfig
        # comes last, because its own checks need every table to be an instance of its class.
        core = self._try(create_model("RunTables", __base__=Section, **fields), self._merged)
        tables = dict(core) if core else {}
        tables |= {name: {} for name in NAMED}
        if self._mixture():
            tables["data"] = self._validate_mixture()
        for place, chosen in self._chosen.items():
            if chosen and place[:2] != _MIXTURE:
                above = tables[str(place[0])] if len(place) > 1 else tables
                above[str(place[-1])] = self._try(chosen.model, self._values(place), place, chosen.owner)
        run = None if self._mistakes else self._try(RunConfig, tables)
        if running and run is not None and run.runner.val_check_interval:
            self._check_evaluators(run)
        if run is None or self._mistakes:
            count = f"{len(self._mistakes)} mistake{'s' if len(self._mistakes) > 1 else ''}"
            lines = "".join(f"\n  {text.replace(chr(10), chr(10) + '  ')}" for text in self._mistakes)
            raise UserError(f"{self._path}: {count} in the config:{lines}")
        return run

    def _values(self, place: KeyPath) -> Any:
        """The values of a table; one that is named by a type has it among them."""
        values = self._get(*place)
        if place[0] in TYPED and isinstance(values, Mapping):
            return {"type": place[1], **values}
        return {} if values is None and place == ("optim",) else values

    def _refuse_secrets(self) -> None:
        """Report passwords and tokens: the config is written to the run's folder, where they do not belong."""
        for place, value in leaves(self._merged):
            key = next((part for part in reversed(place) if isinstance(part, str)), "")
            texts = [one for one in _flat(value) if isinstance(one, str)]
            if any(is_secret(key, one) or without_secrets(one) != one for one in texts):
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
                    self._mistakes.append(explain(one, self._layers, self.tables(), named))
        except UserError as error:
            self._mistakes.append(mistake(place, str(error), self._layers, self._get(*place), owner=named))
        except (Exception, SystemExit) as error:
            doing = f"while {model.__qualname__} of {owner or 'rlinf-core'} validated [{dotted(place)}]"
            if isinstance(error, SystemExit):  # It would end the command with whatever code it has, even 0.
                raise PluginError(f"{exited(error)} [{doing}]") from error
            error.add_note(doing)
            raise
        return None

    def tables(self) -> Tables:
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
            what = f"{why}the datasets of data.mixture set different values ({said}): set it for all"
            if place[0] == "optim":
                self._undecided_optim[str(place[1])] = what  # The optimizer or schedule may have no such key.
            else:
                self._note(place, what)
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

    def _choose_named(
        self, section: str, kind: RegistrationKind, used: Collection[str] | None = None, way_out: str = ""
    ) -> None:
        """Find the class of each table `[<section>.<name>]`.

        Args:
            section: One of `NAMED`.
            kind: What plugins register under the tables' names.
            used: The names that have an effect in this run; None: all.
            way_out: How to put another name to use.
        """
        tables = self._get(section)
        if tables is not None and not isinstance(tables, Mapping):
            self._note((section,), f"must have one table per {NAMED[section]} (got {tables!r})")
            return
        for name in tables or ():
            try:
                chosen = self._find(kind, name)
            except UserError as error:
                self._note((section, name), str(error))
                continue
            if used is None or name in used:
                self._chosen[section, name] = chosen
            else:
                self._note((section, name), f"does nothing: the {kind} {name!r} does not run. {way_out}")

    def _choose_running(self, section: str, kind: RegistrationKind, always: Collection[str]) -> None:
        """Find the classes of what `runner.<section>` names: of those with a table, and whether the others need one.

        Args:
            section: One of `TYPED`.
            kind: What is registered under these names.
            always: Names that may have a table without being listed.
        """
        listed = self._get("runner", section)
        running = [name for name in listed if isinstance(name, str)] if isinstance(listed, list | tuple) else []
        way_out = f"Add it to runner.{section}, or remove the table"
        self._choose_named(section, kind, {*always, *running}, way_out)
        tables = self._get(section)
        for name in running:
            if isinstance(tables, Mapping) and name in tables:
                continue
            try:
                chosen = self._find(kind, name)
                self._try(chosen.model, {"type": name}, (section, name), chosen.owner)
            except UserError as error:
                self._note(("runner", section), str(error))

    def _choose_optim(self) -> _Chosen | None:
        """The class of `[optim]`: made of those of its optimizer and its schedule."""
        given = self._get("optim")
        if not isinstance(given, Mapping | None):
            self._note(("optim",), f"must be a table, [optim] (got {given!r})")
            return None
        table = {**_OPTIM_DEFAULTS, **(given or {})}
        optimizer, schedule = (self._choose_by_default(kind, key) for kind, key in optim_keys.CHOOSES.items())
        if not (optimizer and schedule):
            return None
        if shared := shared_names(optimizer.model, schedule.model):
            self._note(
                ("optim",),
                f"the optimizer {table['type']!r} of {optimizer.owner} and the schedule {table['schedule']!r} of "
                f"{schedule.owner} cannot be used together: both define {', '.join(shared)}",
            )
            return None
        model: type[BaseModel] = compose(optimizer.model, schedule.model, str(optimizer.owner))  # type: ignore[arg-type]
        self._refuse_keys_of_others(table, model)
        for key in sorted(self._undecided_optim.keys() & model.model_fields.keys()):
            self._note(("optim", key), self._undecided_optim[key])
        return _Chosen(model, optimizer.owner)

    def _choose_by_default(self, kind: RegistrationKind, key: str) -> _Chosen | None:
        """What a key of `[optim]` chooses, or what core chooses without it."""
        if self._get("optim", key) is None:
            return self._find(kind, _OPTIM_DEFAULTS[key])
        return self._choose(("optim", key), partial(self._find, kind), "must be a name")

    def _refuse_keys_of_others(self, table: Mapping[str, Any], model: type[BaseModel]) -> None:
        """Leave out keys of `[optim]` that only other optimizers or schedules have: the user's are mistakes, while
        defaults of datasets and policies were written for another choice.
        """
        if not (unknown := table.keys() - model.model_fields.keys()):
            return
        having = optim_keys.having(unknown, self._plugins)
        defaults = len(self._layers) - 2
        for key in sorted(having):
            if any(layer.reaches(("optim", key)) for layer in self._layers[defaults:]):
                self._note(("optim", key), optim_keys.explain(table, having[key]))
        self._layers = [optim_keys.without(layer, having.keys()) for layer in self._layers]

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

    def _check_evaluators(self, run: RunConfig) -> None:
        """Check the run's evaluators against the rest of its config."""
        for chosen in self._plugins.evaluators(run):
            config, place = chosen.config, ("evaluators", chosen.config.type)
            if config.needs_held_out and not run.data.has_validation:
                others = f', or leave "{config.type}" out of runner.evaluators: it needs held-out episodes'
                self._mistakes.append(NOTHING_HELD_OUT + others)
            elif config.weights == "ema" and not run.optim.ema_decay:
                self._note((*place, "weights"), '"ema" does nothing without optim.ema_decay')
            try:
                config.check_run(run)
            except ValueError as error:
                self._mistakes.append(mistake(place, str(error), self._layers, owner=chosen.owner))

    def _note(self, place: KeyPath, what: str) -> None:
        self._mistakes.append(mistake(place, what, self._layers))

    def _add_below(self, origin: str, table: Mapping[str, Any]) -> None:
        self._layers.insert(0, Layer(origin, table))

    def _get(self, *place: str | int) -> Any:
        return value_at(self._merged, place)

    @property
    def _merged(self) -> Table:
        return reduce(merge, (layer.table for layer in self._layers), {})
