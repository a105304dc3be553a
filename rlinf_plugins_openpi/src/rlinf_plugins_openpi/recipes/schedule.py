"""RLinf's learning-rate schedules as those of core, step for step.

RLinf's names: `constant` (its default) and `cosine` are transformers', with a warm-up from 0; `openpi_cosine` and
`ref_warmup_cosine` are openpi's, with a warm-up from lr / (steps + 1); `torch_constant` and `torch_cosine` are
PyTorch's, without a warm-up. Source: `rlinf/hybrid_engines/fsdp/utils.py`.
"""

from __future__ import annotations

from typing import Any

from rlinf_plugins_openpi.recipes.values import Values

_AT = "actor.optim"
OPENPI = ("openpi_cosine", "ref_warmup_cosine")
NAMES = ("constant", "cosine", *OPENPI, "torch_constant", "torch_cosine")


def read_optim(values: Values, max_steps: int | None, *, as_intended: bool) -> dict[str, Any]:
    """The table `[optim]`.

    Args:
        values: The recipe.
        max_steps: Steps of the run, for warnings; None if epochs decide.
        as_intended: Take `warmup_style: cosine`, which RLinf reads nowhere, at its word.
    """
    lr = values.number(f"{_AT}.lr", positive=True) or 0.0
    betas = [values.number(f"{_AT}.adam_beta{number}", below=1) or 0.0 for number in (1, 2)]
    if not values.has(f"{_AT}.weight_decay"):
        values.warn("the recipe has no actor.optim.weight_decay, for which RLinf takes 0.01: so does the config")
    return {
        "lr": lr,
        **_schedule(values, lr, max_steps, as_intended=as_intended),
        "betas": betas,
        "eps": values.number(f"{_AT}.adam_eps", 1e-8, positive=True),
        "weight_decay": values.number(f"{_AT}.weight_decay", 0.01),
        "clip_grad": values.number(f"{_AT}.clip_grad", positive=True) or 0.0,
        "ema_decay": 0.0,
    }


def _schedule(values: Values, lr: float, max_steps: int | None, *, as_intended: bool) -> dict[str, Any]:
    given = values.text(f"{_AT}.lr_scheduler")
    name = given or "constant"
    total = values.integer(f"{_AT}.total_training_steps", 0, least=0) or 0
    warmup = _warmup(values, total)
    least = _min_lr(values, lr)
    cycles = values.number(f"{_AT}.num_cycles", 0.5)
    style = values.text(f"{_AT}.warmup_style")
    if style:
        meant = style == "cosine" and not given
        if meant and as_intended:
            name = "cosine"
        values.drop(f"{_AT}.warmup_style", "RLinf's code reads it nowhere; actor.optim.lr_scheduler is the schedule")
        if meant:
            _warn_of_style(values, lr, as_intended=as_intended)
    elif not given:
        values.warn(f"the recipe names no schedule: RLinf's default is constant, lr = {lr:g} {_until(warmup)}")
    if name not in NAMES:
        values.refuse(f"{_AT}.lr_scheduler", f"there is no schedule {name!r}; RLinf has {', '.join(NAMES)}")
        return {}
    if name in ("constant", "torch_constant"):
        return _constant(values, name, warmup)
    return _cosine(values, name, warmup, total, least, cycles, max_steps)


def _until(warmup: int) -> str:
    return f"after a warm-up of {warmup} steps" if warmup else "from the first step"


def _warn_of_style(values: Values, lr: float, *, as_intended: bool) -> None:
    if as_intended:
        values.warn(
            "warmup_style = cosine is read nowhere in RLinf, whose run stays at a constant learning rate after the "
            "warm-up; as intended, the config decays by a cosine"
        )
    else:
        values.warn(
            f"warmup_style = cosine is read nowhere in RLinf: its schedule is constant, lr = {lr:g} after the warm-up, "
            "and so is the config's. --as-intended writes the cosine"
        )


def _warmup(values: Values, total: int) -> int:
    """Steps, or RLinf's ratio of the schedule's steps if they are negative or not given."""
    steps = values.integer(f"{_AT}.lr_warmup_steps", -1)
    ratio = values.number(f"{_AT}.lr_warmup_steps_ratio", 0.0, below=1) or 0.0
    return int(ratio * total) if steps is None or steps < 0 else steps


def _min_lr(values: Values, lr: float) -> float:
    """`min_lr_rate` wins over `min_lr`."""
    least = values.number(f"{_AT}.min_lr", 0.0) or 0.0
    rate = values.number(f"{_AT}.min_lr_rate")
    return least if rate is None else rate * lr


def _constant(values: Values, name: str, warmup: int) -> dict[str, Any]:
    for key in ("total_training_steps", "min_lr", "min_lr_rate", "num_cycles"):
        if values.has(f"{_AT}.{key}"):
            values.drop(f"{_AT}.{key}", f"the schedule is {name}")
    return {"schedule": "constant", "warmup_steps": warmup if name == "constant" else 0}


def _cosine(
    values: Values, name: str, warmup: int, total: int, least: float, cycles: float | None, max_steps: int | None
) -> dict[str, Any]:
    if cycles != 0.5 and name == "cosine":
        values.refuse(f"{_AT}.num_cycles", f"{cycles}: cosines here are half a cycle, 0.5")
    elif name != "cosine" and values.has(f"{_AT}.num_cycles"):
        values.drop(f"{_AT}.num_cycles", f"{name} is half a cycle")
    if total <= (warmup if name != "torch_cosine" else 0):
        values.refuse(
            f"{_AT}.total_training_steps", f"{total}: a cosine needs more steps than its warm-up has ({warmup})"
        )
    if max_steps is not None and max_steps > total and name not in OPENPI:
        values.warn(
            f"runner.max_steps = {max_steps} goes beyond the cosine's {total} steps, after which RLinf's learning rate "
            f"rises again; here it stays at {least:g}"
        )
    if max_steps is not None and max_steps < total:
        values.warn(f"the run ends at step {max_steps} of a schedule of {total} steps, before the cosine is at its end")
    if name == "torch_cosine":
        return {"schedule": "hf_cosine", "warmup_steps": 0, "min_lr": 1e-6, "decay_steps": total}
    schedule = "cosine" if name in OPENPI else "hf_cosine"
    return {"schedule": schedule, "warmup_steps": warmup, "min_lr": least, "decay_steps": total}
