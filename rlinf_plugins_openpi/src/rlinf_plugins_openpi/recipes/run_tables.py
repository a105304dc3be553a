"""The tables `[cluster]`, `[runner]`, `[loggers]` and `[trainer]` of a recipe."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from rlinf_core.contract.tables.placement import COMPONENT, parse_ranks
from rlinf_plugins_openpi.recipes.values import Values

_FSDP = "actor.fsdp_config"
_BF16, _FP16, _FP32 = ("bf16", "bf16-mixed"), ("16", "fp16", "16-mixed"), ("32", "fp32", "32-true")
PLACEHOLDER = "node0:29500"


def read_cluster(values: Values) -> dict[str, Any]:
    """`[cluster]`: machines, and the accelerators of the component that trains."""
    nodes = values.integer("cluster.num_nodes", 1, least=1) or 1
    ranks = _actors_ranks(values)
    cluster: dict[str, Any] = {"num_nodes": nodes, "component_placement": {COMPONENT: ranks}}
    if nodes > 1:
        cluster["rdzv_endpoint"] = PLACEHOLDER
        values.warn(
            f"several machines find one another by cluster.rdzv_endpoint here, not by Ray: replace {PLACEHOLDER} by "
            "the name and a free port of one of them"
        )
    _check_batches(values, ranks)
    return cluster


def _actors_ranks(values: Values) -> str:
    table = "cluster.component_placement"
    for components, ranks in values.below(table).items():
        if COMPONENT not in (name.strip() for name in components.split(".")[0].split(",")):
            values.drop(f"{table}.{components}", "only the actor trains; there are no other components here")
        elif "." in components or isinstance(ranks, bool) or not isinstance(ranks, int | str):
            values.refuse(
                f"{table}.{components}",
                "node groups are not translated: write all, or a range as in 0-3, and then the groups into the config",
            )
        else:
            try:
                parse_ranks(str(ranks))
            except ValueError as error:
                values.refuse(f"{table}.{components}", str(error))
            return str(ranks)
    if not any(problem.startswith(table) for problem in values.problems):
        values.refuse(table, f"it places no {COMPONENT}, the component that trains")
    return "all"


def _check_batches(values: Values, ranks: str) -> None:
    values.required("actor.micro_batch_size", "actor.global_batch_size")
    micro, batch = (values.peek_integer(f"actor.{name}_batch_size") for name in ("micro", "global"))
    try:
        count = len(parse_ranks(ranks) or (0,))  # "all" is at least one.
    except ValueError:
        return
    if micro and batch and batch % (micro * count):
        values.refuse(
            "actor.global_batch_size",
            f"{batch} is no multiple of actor.micro_batch_size x {count} ranks = {micro * count}",
        )


def read_runner(
    values: Values, loggers: Mapping[str, Any], *, validates: bool = False
) -> tuple[dict[str, Any], dict[str, Any]]:
    """`[runner]` and `[loggers]`.

    Args:
        values: The recipe.
        loggers: The loggers of the installed packages: type -> its fields.
        validates: Whether RLinf validates the model, so that the keys for that are read elsewhere.
    """
    if (task := values.text("runner.task_type")) != "sft":
        values.refuse("runner.task_type", f"{task!r}: only supervised fine-tuning, sft, is imported")
    runner: dict[str, Any] = {
        "name": _name(values),
        "output_dir": values.text("runner.logger.log_path", "runs"),
        **_length(values),
        "save_interval": max(values.integer("runner.save_interval", 0) or 0, 0),
    }
    if interval := runner["save_interval"]:
        values.warn(
            "RLinf keeps every checkpoint; here the newest two are kept, to which runner.keep_every = "
            f"{interval} adds all others"
        )
    if not validates:
        _validation(values)
    _resumed(values)
    chosen, tables = _loggers(values, loggers)
    return runner | ({"loggers": chosen} if chosen else {}), tables


def _name(values: Values) -> str:
    """The experiment's name, as a folder's name may be here."""
    key = "runner.logger.experiment_name"
    given = values.text(key) or "run"
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", given).lstrip("._-") or "run"
    if name != given:
        values.warn(f"{key} = {given!r} is {name!r} here, since it names a folder")
    return name


def _length(values: Values) -> dict[str, Any]:
    """RLinf: steps count from 0, epochs from 1, the smaller limit wins, and without any a run has one epoch."""
    steps, epochs = values.integer("runner.max_steps", -1), values.integer("runner.max_epochs", -1)
    if steps == 0:
        values.refuse("runner.max_steps", "0: RLinf trains no step with it; -1 means no limit")
    limits = {"max_steps": steps, "max_epochs": epochs}
    found = {key: limit for key, limit in limits.items() if limit is not None and limit > 0}
    if not found:
        values.warn("the recipe limits neither steps nor epochs: RLinf trains one epoch, and so does the config")
    return found or {"max_epochs": 1}


def _validation(values: Values) -> None:
    if (values.integer("runner.val_check_interval", -1) or -1) > 0:
        values.warn(
            "runner.val_check_interval: RLinf cannot validate these policies and stops there; here hold episodes out "
            "with data.validation_fraction, then set runner.val_check_interval"
        )
    if values.anything("data.val_data_paths") is not None:
        values.refuse(
            "data.val_data_paths",
            "RLinf cannot validate these policies; here episodes are held out with data.validation_fraction. Leave it "
            "out: ~data.val_data_paths",
        )


def _resumed(values: Values) -> None:
    if folder := values.text("runner.resume_dir"):
        values.refuse(
            "runner.resume_dir",
            "a run of RLinf cannot continue here, but its weights can be trained further: leave it out "
            "(~runner.resume_dir), and set actor.model.model_path to the weights in "
            f"{folder}/actor/model_state_dict. A run of this project continues by itself",
        )


def _loggers(values: Values, known: Mapping[str, Any]) -> tuple[list[str], dict[str, Any]]:
    at = "runner.logger"
    backends = values.anything(f"{at}.logger_backends") or []
    names = [backends] if isinstance(backends, str) else backends
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        values.refuse(f"{at}.logger_backends", f"{backends!r} must be a list of names")
        names = []
    settings = {
        "project": values.text(f"{at}.project_name"),
        "entity": values.text(f"{at}.wandb_entity"),
        "mode": values.text(f"{at}.swanlab_mode"),
    }
    proxy = values.text(f"{at}.wandb_proxy")
    if proxy:
        values.drop(f"{at}.wandb_proxy", "the environment variable HTTPS_PROXY says it to every library")
    if missing := [name for name in names if name not in known]:
        values.warn(
            f"no installed package has the logger {' or '.join(missing)}: metrics are in metrics.jsonl. Once one is "
            f"installed, add runner.loggers = {missing}".replace("'", '"')
        )
    tables: dict[str, Any] = {}
    for name in (chosen := [name for name in dict.fromkeys(names) if name in known]):
        own = {key: text for key, text in settings.items() if text and key in known[name]}
        own = {key: text for key, text in own.items() if key == "project" or (key == "entity") == (name == "wandb")}
        if own:
            tables[name] = own
    keys = {"project": "project_name", "entity": "wandb_entity", "mode": "swanlab_mode"}
    for key, theirs in keys.items():
        if settings[key] and not any(key in table for table in tables.values()):
            values.drop(f"{at}.{theirs}", "a setting of a tracker, for its table [loggers.<type>]")
    return chosen, tables


def read_trainer(values: Values, *, port: bool, as_intended: bool) -> dict[str, Any]:
    """`[trainer]`.

    Args:
        values: The recipe.
        port: Whether the model is RLinf's own port of openpi, which can recompute activations.
        as_intended: Recompute activations if the recipe says so, although RLinf's code of the other model does not.
    """
    if (backend := values.text("actor.training_backend")) not in ("fsdp", "fsdp2"):
        values.refuse("actor.training_backend", f"{backend!r}: only fsdp is imported; the trainer here is FSDP2")
    return {
        "global_batch_size": values.integer("actor.global_batch_size", 1, least=1),
        "micro_batch_size": values.integer("actor.micro_batch_size", 1, least=1),
        "param_dtype": _param_dtype(values, port=port),
        **_sharding(values),
        "activation_checkpointing": _recomputed(values, port=port, as_intended=as_intended),
        "cpu_offload": values.switch(f"{_FSDP}.cpu_offload"),
        "reduce_every_micro_batch": not values.switch(f"{_FSDP}.enable_gradient_accumulation", default=True),
    }


def _sharding(values: Values) -> dict[str, Any]:
    fsdp2 = values.text(f"{_FSDP}.strategy", "fsdp") == "fsdp2"
    strategy = values.text(f"{_FSDP}.sharding_strategy", "full_shard") or ""
    reshard = values.switch(f"{_FSDP}.reshard_after_forward", default=True)
    nodes = values.peek_integer("cluster.num_nodes") or 1
    known = ("full_shard", "shard_grad_op", "hybrid_shard", "no_shard", "_hybrid_shard_zero2")
    if strategy not in known:
        values.refuse(f"{_FSDP}.sharding_strategy", f"there is no {strategy!r}; it is one of {', '.join(known[:4])}")
    if strategy == "no_shard":
        values.warn(
            "sharding_strategy = no_shard: weights, gradients and optimizer states are sharded here nevertheless, "
            "which gives the same numbers with less memory; trainer.num_replicas keeps several copies"
        )
    if not fsdp2 and values.has(f"{_FSDP}.reshard_after_forward"):
        values.drop(f"{_FSDP}.reshard_after_forward", "FSDP1 does not read it: sharding_strategy decides")
    kept = (fsdp2 and not reshard) or strategy in ("shard_grad_op", "_hybrid_shard_zero2")
    found: dict[str, Any] = {"reshard_after_forward": not kept}
    if "hybrid" in strategy and nodes > 1:
        found["num_replicas"] = nodes
    return found


def _recomputed(values: Values, *, port: bool, as_intended: bool) -> str:
    asked = values.switch(f"{_FSDP}.gradient_checkpointing")
    if asked and not port and not as_intended:
        values.warn(
            "gradient_checkpointing = true has no effect in RLinf, whose openpi model switches it off for fine-tuning: "
            "the config does not recompute activations either. It changes memory and speed, not results; --as-intended "
            "writes it"
        )
    return "full" if asked and (port or as_intended) else "none"


def _param_dtype(values: Values, *, port: bool) -> str:
    """The dtype of matrix products: FSDP's, else autocast's, else that in which RLinf keeps the weights."""
    kept = _dtype(values, "actor.model.precision") or ("fp32" if port else "bf16")
    computed = _dtype(values, f"{_FSDP}.mixed_precision.param_dtype")
    reduced = _dtype(values, f"{_FSDP}.mixed_precision.reduce_dtype") or kept
    autocast = values.switch(f"{_FSDP}.amp_autocast.enabled")
    cast = _dtype(values, f"{_FSDP}.amp_autocast.precision")
    if not autocast and values.has(f"{_FSDP}.amp_autocast.precision"):
        values.drop(f"{_FSDP}.amp_autocast.precision", "autocast is off")
    if kept != "fp32":
        values.warn(
            "RLinf keeps the weights, and with them AdamW's moments, in bfloat16 for this recipe "
            "(actor.model.precision); here they are always float32, so that small updates are not rounded away"
        )
    if reduced != "fp32":
        values.warn("RLinf sums gradients over the ranks in bfloat16 for this recipe; here they are always float32")
    return computed or (cast if autocast else None) or kept


def _dtype(values: Values, key: str) -> str | None:
    """`bf16`, `fp32` or None; RLinf's other spellings are understood."""
    text = values.text(key)
    if text is None or text == "null":
        return None
    if text in _BF16:
        return "bf16"
    if text in _FP32:
        return "fp32"
    values.refuse(key, f"{text!r}: " + ("fp16 is not here, use bf16" if text in _FP16 else "write bf16, fp32 or null"))
    return None
