"""The table `[optim]`: `optim.type` chooses an optimizer, `optim.schedule` a learning-rate schedule.

Each brings its keys, and the class that validates the table is made of both (`compose`). Torch-free: what computes is
imported when it is needed.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from rlinf_core.contract.tables.runner import Section
from rlinf_core.errors import PluginError
from rlinf_core.optimizers.parameters import TrainedParameter

if TYPE_CHECKING:
    import torch

    from rlinf_core.optimizers.adamw import AdamW

__all__ = ["OptimConfig", "OptimTable", "OptimizerConfig", "ScheduleConfig", "TrainedParameter", "compose"]


class OptimizerConfig(Section):
    """An optimizer that `optim.type` can name, and its keys in `[optim]`.

    A subclass gives `type` a `Literal` of its own with a default, adds fields, and defines `build` and `initial_state`.
    Core's optimizer step does the rest for every optimizer: gradients are clipped, a step with NaN or infinity is
    skipped, the learning rate follows the schedule, and checkpoints hold the state.
    """

    not_here: ClassVar[Mapping[str, str]] = {}
    """Types that users may expect and no plugin has -> what to use instead."""

    elementwise: ClassVar[bool] = False
    """Whether an element's update depends on that element's weight, gradient and state alone. If so, `build` and
    `initial_state` get plain tensors, this rank's shards, for which any optimizer of torch works, fused ones included;
    the state is in their shape, or scalars. Otherwise they get the sharded parameters themselves."""

    type: str
    """Which optimizer this is."""
    lr: float = Field(default=2.5e-5, gt=0)
    """Peak learning rate."""
    clip_grad: float = Field(default=1.0, gt=0)
    """Largest global gradient norm; larger gradients are divided by norm / clip_grad."""
    ema_decay: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Decay rate of an exponential moving average of the weights (float32, 4 bytes per parameter); 0: no average."""

    @property
    def unused_weight_decay(self) -> float:
        """Decoupled weight decay of parameters that the loss does not depend on, which have neither gradient nor state.

        Each step multiplies them by 1 - lr · this. 0: they never change.
        """
        return 0.0

    def build(self, parameters: Sequence[TrainedParameter]) -> torch.optim.Optimizer:
        """Build the optimizer. Called on every rank, after the parameters have been sharded and filled.

        The `lr` of a group of parameters is its peak: the schedule multiplies those of all groups by the same factor. A
        tensor is changed in place, on its device; for a number, the host waits for the device in each step. The same is
        true of gradients: an optimizer that sets `_step_supports_amp_scaling` reads `self.grad_scale` and
        `self.found_inf` (tensors, as from `torch.amp.GradScaler`); any other gets scaled gradients, and its step is not
        called if it is skipped.

        Args:
            parameters: All that is trained; none may be left out. Parameters and gradients are float32, and `DTensor`s
                in a run unless the class is `elementwise`. With `DTensor`s, do not use torch's fused optimizers, which
                in torch 2.11 keep about 0.5 KB of host memory for every parameter and step.
        """
        raise NotImplementedError(f"{type(self).__name__} must define build()")

    def initial_state(self, parameter: TrainedParameter) -> Mapping[str, torch.Tensor]:
        """The state of a parameter before the first step, as the optimizer keeps it in `state[parameter]`.

        It is there from the start, so that checkpoints always hold the same tensors, and steps must change it in place.
        `rlinf plan` counts its bytes: tensors in the parameter's shape are sharded as it is, others are on every rank.

        Args:
            parameter: `parameter.parameter` gives shape, device and sharding: use `torch.zeros_like`. It may be on the
                meta device.
        """
        raise NotImplementedError(f"{type(self).__name__} must define initial_state()")


class ScheduleConfig(Section):
    """A learning-rate schedule that `optim.schedule` can name, and its keys in `[optim]`.

    A subclass gives `schedule` a `Literal` of its own with a default, adds fields, and defines `lr_at`.
    """

    not_here: ClassVar[Mapping[str, str]] = {}
    """Schedules that users may expect and no plugin has -> what to use instead."""

    schedule: str
    """Which learning-rate schedule this is."""
    lr: float = Field(default=2.5e-5, gt=0)
    """Peak learning rate."""

    def lr_at(self, step: torch.Tensor) -> torch.Tensor:
        """The learning rate of a step, computed on the device without waiting for it.

        Args:
            step: Scalar, float32: number of the step, from 0. Skipped steps are not counted.

        Returns:
            Scalar, float32, on the same device.
        """
        raise NotImplementedError(f"{type(self).__name__} must define lr_at()")

    def note(self, last_step: int) -> str:
        """What a user should know of a run that ends after `last_step` steps; empty: nothing."""
        return ""


class OptimTable(OptimizerConfig, ScheduleConfig):
    """The `[optim]` table of a run: an optimizer and a schedule. `compose` makes the class."""

    optimizer_origin: ClassVar[str] = "AdamWConfig of rlinf-core"
    """The optimizer's class and the distribution that registered it, for messages."""


def shared_names(optimizer: type[OptimizerConfig], schedule: type[ScheduleConfig]) -> list[str]:
    """Fields, methods and validators that both classes define; one would silently replace the other."""
    return sorted((_own_names(optimizer) & _own_names(schedule)) - {"lr", "not_here"})


def _own_names(model: type[Section]) -> set[str]:
    classes = [cls for cls in model.__mro__ if issubclass(cls, OptimizerConfig | ScheduleConfig)]
    names = {name for cls in classes for name in (*vars(cls), *vars(cls).get("__annotations__", {}))}
    return {name for name in names if not name.startswith(("__", "_abc_"))} - {"model_config"} | set(model.model_fields)


@functools.cache
def compose(
    optimizer: type[OptimizerConfig], schedule: type[ScheduleConfig], owner: str = "rlinf-core"
) -> type[OptimTable]:
    """The class of `[optim]` for an optimizer and a schedule; always the same one.

    Args:
        optimizer: Its keys and what it builds.
        schedule: Its keys and the learning rate.
        owner: The distribution that registered the optimizer, for messages.

    Raises:
        PluginError: Both define the same key or method, other than `lr`.
    """
    if shared := shared_names(optimizer, schedule):
        raise PluginError(
            f"the optimizer {optimizer.__qualname__} ({optimizer.__module__}) and the schedule {schedule.__qualname__} "
            f"({schedule.__module__}) cannot be used together: both define {', '.join(shared)}"
        )
    if (optimizer, schedule) == (AdamWConfig, CosineConfig):
        return OptimConfig

    def reduce(self: OptimTable) -> tuple[Any, ...]:
        return _empty, (optimizer, schedule, owner), self.__getstate__()

    body = {
        "__module__": __name__,
        "__doc__": OptimTable.__doc__,
        "__annotations__": {"optimizer_origin": ClassVar[str]},
        "optimizer_origin": f"{optimizer.__name__} of {owner}",
        "__reduce__": reduce,
    }
    made: type[OptimTable] = type(
        f"{optimizer.__name__}And{schedule.__name__}", (optimizer, schedule, OptimTable), body
    )
    return made


def _empty(optimizer: type[OptimizerConfig], schedule: type[ScheduleConfig], owner: str) -> OptimTable:
    """An instance that unpickling fills: the composed class itself has no name that another process could import."""
    cls = compose(optimizer, schedule, owner)
    return cls.__new__(cls)


class AdamWConfig(OptimizerConfig):
    """AdamW on float32 weights, one fused kernel."""

    elementwise: ClassVar[bool] = True
    type: Literal["adamw"] = "adamw"
    not_here: ClassVar[Mapping[str, str]] = {
        "adam": 'optim.type = "adamw" with weight_decay = 0 is Adam',
        "adamw_torch": 'optim.type = "adamw" is torch\'s AdamW, fused',
        "adamw_torch_fused": 'optim.type = "adamw" is torch\'s AdamW, fused',
    }
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the first and second moment."""
    eps: float = Field(default=1e-8, gt=0)
    """AdamW's epsilon, outside the root."""
    weight_decay: float = Field(default=1e-10, ge=0)
    """Decoupled weight decay, on every parameter (the reference's value)."""

    @property
    def unused_weight_decay(self) -> float:
        """All parameters decay."""
        return self.weight_decay

    def build(self, parameters: Sequence[TrainedParameter]) -> torch.optim.Optimizer:
        """The fused AdamW of torch."""
        return self._recipe.build(parameters)

    def initial_state(self, parameter: TrainedParameter) -> Mapping[str, torch.Tensor]:
        """Two moments and a step counter."""
        return self._recipe.initial_state(parameter)

    @property
    def _recipe(self) -> AdamW:
        from rlinf_core.optimizers.adamw import AdamW

        return AdamW(self.lr, self.betas, self.eps, self.weight_decay)


class WarmupConfig(ScheduleConfig):
    """A schedule that begins with a linear warm-up."""

    warmup_steps: int = Field(default=1000, ge=0)
    """Steps until the learning rate is lr."""

    def note(self, last_step: int) -> str:
        """Report a warm-up that is longer than the run."""
        if self.warmup_steps < last_step:
            return ""
        return f"the warm-up of {self.warmup_steps} steps (optim.warmup_steps) does not end before this run does"


class DecayConfig(WarmupConfig):
    """A schedule that ends with a decay."""

    min_lr: float = Field(default=2.5e-6, ge=0)
    """Learning rate at the end of the decay and after it."""
    decay_steps: int = Field(default=30_000, ge=1)
    """Step, counted from 0, at which the decay reaches `min_lr`. It does not depend on `runner.max_steps`."""

    @model_validator(mode="after")
    def _decay_follows_warmup(self) -> DecayConfig:
        if self.decay_steps <= self.warmup_steps:
            raise ValueError(f"decay_steps ({self.decay_steps}) must be larger than warmup_steps ({self.warmup_steps})")
        if self.min_lr > self.lr:
            raise ValueError(
                f"min_lr ({self.min_lr}) must not be larger than lr ({self.lr}): set optim.min_lr, too, "
                f"for example to a tenth ({self.lr / 10:g}), or to lr itself for no decay"
            )
        return self

    def note(self, last_step: int) -> str:
        """Report a decay that is longer than the run."""
        if said := super().note(last_step):
            return said
        if self.decay_steps <= last_step:
            return ""
        return f"the learning rate decays until step {self.decay_steps} (optim.decay_steps), after the end of the run"


class CosineConfig(DecayConfig):
    """openpi's schedule: warm-up from lr / (warmup_steps + 1), then a cosine to `min_lr`."""

    schedule: Literal["cosine"] = "cosine"
    not_here: ClassVar[Mapping[str, str]] = {
        "openpi_cosine": 'RLinf\'s openpi_cosine is optim.schedule = "cosine"',
        "cosine_with_warmup": 'transformers\' cosine is optim.schedule = "hf_cosine"',
    }
    warmup_steps: int = Field(default=1000, ge=0)
    """Steps from lr / (warmup_steps + 1) to lr."""
    decay_steps: int = Field(default=30_000, ge=1)
    """Step, counted from 0, at which the cosine reaches `min_lr`. It does not depend on `runner.max_steps`."""

    def lr_at(self, step: torch.Tensor) -> torch.Tensor:
        """Optax's `warmup_cosine_decay_schedule`, in its order of operations."""
        from rlinf_core.optimizers.schedules import openpi_cosine

        return openpi_cosine(
            step.float(),
            lr=self.lr,
            min_lr=self.min_lr,
            warmup_steps=self.warmup_steps,
            decay_steps=self.decay_steps,
        )


class OptimConfig(AdamWConfig, CosineConfig, OptimTable):
    """The `[optim]` table by default: AdamW with openpi's cosine."""
