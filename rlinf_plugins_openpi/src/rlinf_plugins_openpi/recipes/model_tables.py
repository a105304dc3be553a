"""The tables `[data]` and `[policy]` of a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlinf_core.errors import did_you_mean
from rlinf_plugins_openpi.datasets.config import OpenpiDatasetConfig
from rlinf_plugins_openpi.recipes.formats import FORMATS, ROBOCASA, RlinfFormat
from rlinf_plugins_openpi.recipes.values import Values
from rlinf_plugins_openpi.settings import LORA

_MODEL, _OPENPI, _DATA = "actor.model", "actor.model.openpi", "actor.model.openpi_data"
TOKENIZER = "google/paligemma-3b-pt-224"
VARIANTS = {("gemma_2b", "gemma_300m"): "base", ("dummy", "dummy"): "dummy"}
"""openpi's names of the language model's and the action expert's sizes -> `policy.variant`."""


def is_port(values: Values) -> bool:
    """Whether the model is RLinf's own port of openpi: by its older name, or by the key that only the port has."""
    return values.text(f"{_MODEL}.model_type") == "openpi_rlinf" or values.has(f"{_OPENPI}.task")


def read_policy(values: Values, cls: type[OpenpiDatasetConfig], *, port: bool, as_intended: bool) -> dict[str, Any]:
    """`[policy]`.

    Args:
        values: The recipe.
        cls: The class of its format.
        port: Whether the model is RLinf's own port.
        as_intended: Believe keys that RLinf does not read.
    """
    if (task := values.text(f"{_OPENPI}.task", "sft")) != "sft":
        values.refuse(f"{_OPENPI}.task", f"{task!r}: only sft is imported")
    _refuse_others(values)
    of_format = dict(cls.run_defaults.get("policy", {}))
    _check_type(values, str(of_format.get("type", "")), port=port)
    policy: dict[str, Any] = {"weights": values.text(f"{_MODEL}.model_path"), "tokenizer": TOKENIZER}
    if (variant := _variant(values)) != "base":
        policy |= {"variant": variant, "tokenizer": ""}
    policy["action_horizon"] = _horizon(values, int(of_format.get("action_horizon", 50)), port=port)
    policy |= _prompt(values, of_format, cls, port=port, as_intended=as_intended)
    if width := values.integer(f"{_OPENPI}.model_action_dim", least=1):
        policy["action_dim"] = width
    if steps := _denoising_steps(values, port=port):
        policy["num_sampling_steps"] = steps
    policy |= _frozen(values, port=port, as_intended=as_intended)
    return policy


def _refuse_others(values: Values) -> None:
    if values.switch(f"{_MODEL}.is_lora"):
        values.refuse(
            f"{_MODEL}.is_lora",
            f"where RLinf puts adapters is not translated: import with {_MODEL}.is_lora=False, and write a table "
            "[policy.lora] with rank, alpha and targets into the config",
        )
    if values.switch(f"{_OPENPI}.use_rlt"):
        values.refuse(
            f"{_OPENPI}.use_rlt",
            "the first stage of RLT adds a loss of its own, with an encoder that is not here. To fine-tune the policy "
            f"alone: {_OPENPI}.use_rlt=False",
        )


def _check_type(values: Values, ours: str, *, port: bool) -> None:
    key = f"{_MODEL}.pi05"
    says = values.switch(key, default=ours == "pi05")
    if says != (ours == "pi05"):
        why = "the key says the other" if port else "the key, which only RLinf's port reads, says the other"
        values.refuse(key, f"{str(says).lower()}: the format is one of {ours}, and {why}. Correct one of them")


def _variant(values: Values) -> str:
    names = (values.text(f"{_OPENPI}.paligemma_variant", ""), values.text(f"{_OPENPI}.action_expert_variant", ""))
    found = next(
        (ours for theirs, ours in VARIANTS.items() if all(n in ("", t) for n, t in zip(names, theirs, strict=True))), ""
    )
    if not found:
        lora = any("lora" in str(name) for name in names)
        values.refuse(
            f"{_OPENPI}.paligemma_variant",
            LORA if lora else f"{' and '.join(map(str, names))}: available are gemma_2b with gemma_300m",
        )
    return found or "base"


def _horizon(values: Values, of_format: int, *, port: bool) -> int:
    """The port trains chunks of `num_action_chunks`; the other model those of its format."""
    executed = values.integer(f"{_MODEL}.num_action_chunks", least=1)
    explicit = values.integer(f"{_OPENPI}.action_horizon", least=1)
    if port:
        if explicit and executed and explicit != executed:
            values.warn(
                f"openpi.action_horizon = {explicit} has no effect in RLinf's port: chunks have {executed} actions"
            )
        return executed or explicit or of_format
    if explicit and explicit != of_format:
        values.warn(
            f"openpi.action_horizon = {explicit}, but RLinf's reader of this format makes chunks of {of_format} "
            f"actions, so that it stops there; the config trains chunks of {explicit}"
        )
    if executed and executed != (explicit or of_format):
        values.drop(
            f"{_MODEL}.num_action_chunks",
            f"the number of actions that a robot executes, decided at deployment; chunks have {explicit or of_format}",
        )
    return explicit or of_format


def _prompt(
    values: Values, of_format: Mapping[str, Any], cls: type[OpenpiDatasetConfig], *, port: bool, as_intended: bool
) -> dict[str, Any]:
    """Length of the prompt, and whether it has the state: as the format says, unless the port's own reader decides."""
    is_pi05 = of_format.get("type") == "pi05"
    defaults: dict[str, Any] = {"max_token_len": 200 if is_pi05 else 48, "discrete_state_input": is_pi05} | dict(
        of_format
    )
    given = {
        "max_token_len": values.integer(f"{_OPENPI}.max_token_len", least=1),
        "discrete_state_input": values.switch(f"{_OPENPI}.discrete_state_input", defaults["discrete_state_input"]),
    }
    own_reader = port and bool(cls.model_fields["state_order"].get_default())
    found: dict[str, Any] = {}
    for key, value in given.items():
        if not values.has(f"{_OPENPI}.{key}"):
            continue
        if value != defaults[key] and not (own_reader or as_intended):
            values.warn(
                f"openpi.{key} = {str(value).lower()} has no effect in RLinf: its reader of this format takes "
                f"{str(defaults[key]).lower()}, and so does the config. --as-intended writes the recipe's"
            )
            value = defaults[key]
        found[key] = value
    return found


def _denoising_steps(values: Values, *, port: bool) -> int | None:
    whole, inner = (values.integer(f"{at}.num_steps", least=1) for at in (_MODEL, _OPENPI))
    return (whole or inner) if port else (inner or whole)


def _frozen(values: Values, *, port: bool, as_intended: bool) -> dict[str, Any]:
    if not values.switch(f"{_OPENPI}.train_expert_only"):
        return {}
    if port and not as_intended:
        values.warn(
            "openpi.train_expert_only = true has no effect in RLinf's port, which trains all weights in fine-tuning: "
            "so does the config. --as-intended freezes the vision-language model"
        )
        return {}
    return {"freeze": "vlm"}


def read_data(values: Values, name: str, cls: type[OpenpiDatasetConfig], *, port: bool) -> dict[str, Any]:
    """`[data]`, or `[[data.mixture]]` if the recipe names several datasets.

    Args:
        values: The recipe.
        name: Its `config_name`.
        cls: The class of this format.
        port: Whether the model is RLinf's own port.
    """
    facts = FORMATS.get(name, RlinfFormat(""))
    known = name in FORMATS
    workers = values.integer("data.num_workers", least=0)
    datasets = _datasets(values)
    fields = _fields(values, name, facts, cls)
    statistics = _statistics(values, name, facts, datasets, known=known, port=port)
    _check_cameras(values, cls, fields)
    _check_width(values, name, cls, fields)
    table: dict[str, Any] = {} if workers is None else {"num_workers": workers}
    if len(datasets) == 1:
        return {"config_name": name, "repo_id": datasets[0][0], **table, **fields, **statistics}
    entries = [
        {"config_name": name, "repo_id": path, "weight": weight, **fields, **statistics} for path, weight in datasets
    ]
    return {**table, "mixture": entries}


def _datasets(values: Values) -> list[tuple[str, float]]:
    """Paths and weights; the older name of the key is `data.data_paths`."""
    current, older = "data.train_data_paths", "data.data_paths"
    key = older if values.has(older) or values.pending(older) else current
    given = values.below(key) or values.anything(key)
    if given is None:
        values.refuse("data.train_data_paths", "is missing: the folder of a LeRobot dataset, or its id on the hub")
        return [("", 1.0)]
    entries = given if isinstance(given, list) else [given]
    found = [one for entry in entries if (one := _dataset(values, key, entry))]
    if not found and not values.problems:
        values.refuse(key, "names no dataset")
    if len(found) > 1:
        values.warn(
            f"{key} names {len(found)} datasets, of which RLinf's reader for openpi trains on the first alone; the "
            "config mixes them by their weights. To train on the first, leave the others out"
        )
    return found or [("", 1.0)]


def _dataset(values: Values, key: str, entry: Any) -> tuple[str, float] | None:
    if isinstance(entry, str) and entry.strip():
        return entry, 1.0
    path = (entry.get("dataset_path") or entry.get("data_path")) if isinstance(entry, Mapping) else None
    weight = entry.get("weight", 1.0) if isinstance(entry, Mapping) else None
    if not isinstance(path, str) or isinstance(weight, bool) or not isinstance(weight, int | float) or weight < 0:
        values.refuse(key, f"{entry!r} must be a path, or dataset_path with a weight of at least 0")
        return None
    if others := sorted({*entry} - {"dataset_path", "data_path", "weight"}):
        values.refuse(key, f"{', '.join(map(str, others))} of {path} is unknown: an entry has dataset_path and weight")
    if not weight:
        values.drop(f"{key}: {path}", "its weight is 0")
        return None
    return path, float(weight)


def _fields(values: Values, name: str, facts: RlinfFormat, cls: type[OpenpiDatasetConfig]) -> dict[str, Any]:
    """`openpi_data`: fields of RLinf's class of the format."""
    fields: dict[str, Any] = {}
    delta = values.switch(f"{_DATA}.extra_delta_transform") if values.has(f"{_DATA}.extra_delta_transform") else None
    if name not in FORMATS:
        facts = RlinfFormat("", fields={key: key for key in values.pending(_DATA) if key in cls.model_fields})
    if name == "pi0_custom":
        delta = bool(delta)
        width = values.peek_integer(f"{_MODEL}.action_dim") or 7
        fields |= {"action_width": width, "padded_width": 32}
    if delta is not None and facts.delta is None:
        known = name in FORMATS
        why = "RLinf's code of this format does not read it" if known else "the format's class says it, or [data]"
        values.drop(f"{_DATA}.extra_delta_transform", why)
    elif delta is not None and facts.delta is not None:
        fields |= facts.delta[delta]
    for theirs, ours in facts.fields.items():
        if values.has(f"{_DATA}.{theirs}"):
            kind = type(cls.model_fields[ours].get_default())
            read = values.switch if kind is bool else values.integer if kind is int else values.text
            fields[ours] = read(f"{_DATA}.{theirs}")
    fields |= _named_parts(values, name)
    if name == "pi05_rlt_maniskill_joint":
        fields |= _columns(values, cls)
    if values.switch(f"{_DATA}.action_train_with_rotation_6d"):
        values.warn(
            "openpi_data.action_train_with_rotation_6d has no effect in RLinf; here it has, with data.rotation_format "
            "and the places of the rotations: see the page on formats"
        )
    _refuse_rest(values, name)
    return fields


def _named_parts(values: Values, name: str) -> dict[str, Any]:
    """RoboCasa's named parts of state, action and cameras."""
    if "robocasa" not in name:
        return {}
    fields: dict[str, Any] = {}
    for key, choices in ROBOCASA.items():
        value = values.anything(f"{_DATA}.{key}")
        if value is None:
            continue
        if not isinstance(value, str) or value not in choices:
            values.refuse(f"{_DATA}.{key}", f"{value!r} is not here: use {' or '.join(choices)}, or fields of [data]")
        else:
            fields |= choices[value]
    return fields


def _columns(values: Values, cls: type[OpenpiDatasetConfig]) -> dict[str, Any]:
    """The columns that RLinf's format of peg insertion lets a recipe rename."""
    images = dict(cls.model_fields["images"].get_default())
    for theirs, camera in (("image_key", "base_0_rgb"), ("wrist_image_key", "left_wrist_0_rgb")):
        images[camera] = values.text(f"{_DATA}.{theirs}", images[camera])
    fields: dict[str, Any] = {"images": images} if images != cls.model_fields["images"].get_default() else {}
    for theirs, ours in (("state_key", "state"), ("action_key", "actions")):
        if column := values.text(f"{_DATA}.{theirs}"):
            fields[ours] = [column]
    if column := values.text(f"{_DATA}.prompt_key") or values.text(f"{_DATA}.task_key"):
        fields |= {"prompt_from_task": True, **({} if column in ("task", "prompt") else {"prompt_column": column})}
    if values.text(f"{_DATA}.extra_view_image_key"):
        values.drop(f"{_DATA}.extra_view_image_key", "RLinf's inputs of this format do not show it to the policy")
    return fields


def _refuse_rest(values: Values, name: str) -> None:
    known = {"repo_id", "norm_stats_path"}
    for key in values.pending(_DATA):
        if key not in known:
            values.anything(f"{_DATA}.{key}")
            allowed = known | {*FORMATS.get(name, RlinfFormat("")).fields, "extra_delta_transform"}
            values.refuse(f"{_DATA}.{key}", f"RLinf's format {name} has no such field{did_you_mean(key, allowed)}")


def _statistics(
    values: Values, name: str, facts: RlinfFormat, datasets: list[tuple[str, float]], *, known: bool, port: bool
) -> dict[str, Any]:
    """Where RLinf finds the statistics: a file that is named, assets, or a folder below the weights."""
    named = values.text(f"{_DATA}.norm_stats_path")
    asset = values.text(f"{_DATA}.repo_id")
    folder, asset_of_port = values.text(f"{_OPENPI}.assets_dir"), values.text(f"{_OPENPI}.asset_id")
    if named:
        _drop_assets(values, "openpi_data.norm_stats_path names the file")
        return {"norm_stats": named if named.endswith(".json") else f"{named}/norm_stats.json"}
    own_reader = port and "robotwin" not in name
    if folder and own_reader:
        return {"assets": {"assets_dir": folder, "asset_id": asset_of_port or asset or facts.asset_id}}
    _drop_assets(values, "RLinf's reader of this format takes statistics from below the weights")
    if not known and not asset:
        values.warn("RLinf's list has no such format, so its statistics are not known: they are computed from the data")
        return {}
    weights = values.peek_text(f"{_MODEL}.model_path") or ""
    where = asset or facts.asset_id or datasets[0][0]
    said = f"statistics are read from {weights}/{where}/norm_stats.json, as RLinf does"
    values.warn(f"{said}; without the table [data.assets] they are computed from the training rows")
    if facts.statistics_of_pi0:
        values.warn(f"RLinf's own list names statistics of π0 for {name}: make sure that these have π0.5's quantiles")
    return {"assets": {"assets_dir": weights, "asset_id": where}}


def _drop_assets(values: Values, why: str) -> None:
    for key in ("assets_dir", "asset_id"):
        if values.has(f"{_OPENPI}.{key}"):
            values.drop(f"{_OPENPI}.{key}", why)


def _check_cameras(values: Values, cls: type[OpenpiDatasetConfig], fields: Mapping[str, Any]) -> None:
    shown = len(fields.get("images", cls.model_fields["images"].get_default()))
    count = values.integer(f"{_OPENPI}.num_images_in_input", least=1)
    if count:
        same = "the format shows as many" if count == shown else f"the format shows {shown}, which is what trains"
        values.drop(f"{_OPENPI}.num_images_in_input", f"data.images are the cameras: {same}")


def _check_width(values: Values, name: str, cls: type[OpenpiDatasetConfig], fields: Mapping[str, Any]) -> None:
    width = values.integer(f"{_MODEL}.action_dim", least=1)
    own = fields.get("action_width", cls.model_fields["action_width"].get_default())
    if width and own and width != own:
        values.warn(
            f"actor.model.action_dim = {width}, but actions of {name} have {own} numbers in RLinf's code: the config "
            "takes these. For others, set data.action_width"
        )
