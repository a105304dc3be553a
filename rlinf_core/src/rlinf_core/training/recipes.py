"""Core's optimizers and schedules besides AdamW and the cosine (`contract.optim`), as registered. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from rlinf_core.contract.optim import DecayConfig, OptimizerConfig, TrainedParameter, WarmupConfig
from rlinf_core.errors import UserError

if TYPE_CHECKING:
    import torch

    from rlinf_core.optimizers.adamw import AdamW


class MuonConfig(OptimizerConfig):
    """Muon for the matrices of the policy's repeated blocks, AdamW for everything else."""

    type: Literal["muon"] = "muon"
    momentum: float = Field(default=0.95, ge=0, lt=1)
    """Decay rate of the moving average of a matrix's gradients."""
    nesterov: bool = True
    """Orthogonalise Nesterov's average: of gradient and momentum once more."""
    ns_steps: int = Field(default=5, ge=1, le=20)
    """Newton-Schulz iterations that orthogonalise a matrix."""
    ns_dtype: Literal["bf16", "fp32"] = "bf16"
    """Dtype of these iterations, and of what ranks exchange for them; `fp32`: slower, and closer to equal on other
    numbers of ranks."""
    adjust_lr: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    """Factor of a matrix's learning rate: `match_rms_adamw`, 0.2 * sqrt(max(rows, columns)), for which `lr` and
    `weight_decay` are AdamW's; `original`, sqrt(max(1, rows / columns)), for which `lr` is about 0.02: set `adamw_lr`,
    too."""
    adamw_lr: float = Field(default=0.0, ge=0)
    """Peak learning rate of what AdamW trains; the schedule scales it like `lr`. 0: the same as `lr`."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the first and second moment."""
    eps: float = Field(default=1e-8, gt=0)
    """AdamW's epsilon, outside the root."""
    weight_decay: float = Field(default=1e-10, ge=0)
    """Decoupled weight decay, on every parameter."""

    @property
    def unused_weight_decay(self) -> float:
        """All parameters decay."""
        return self.weight_decay

    def build(self, parameters: Sequence[TrainedParameter]) -> torch.optim.Optimizer:
        """Muon, with the rest of the parameters in an AdamW of its own.

        Raises:
            UserError: There is no matrix for it.
        """
        import torch

        from rlinf_core.optimizers.muon import Muon, Settings, is_matrix
        from rlinf_core.optimizers.orthogonal import Iterations

        if not any(map(is_matrix, parameters)):
            raise UserError(
                'optim.type = "muon" has nothing to do: no trained parameter is a matrix in one of the repeated blocks '
                'that the policy names (ShardUnit.block). Set optim.type = "adamw", or train the blocks'
            )

        iterations = Iterations(self.ns_steps, torch.bfloat16 if self.ns_dtype == "bf16" else torch.float32)
        matrices = Settings(self.lr, self.momentum, self.nesterov, iterations, self.weight_decay, self.adjust_lr)
        return Muon(parameters, matrices, self._adamw)

    def initial_state(self, parameter: TrainedParameter) -> Mapping[str, torch.Tensor]:
        """One moment of a matrix; AdamW's state of anything else."""
        import torch

        from rlinf_core.optimizers.muon import is_matrix

        if is_matrix(parameter):
            tensor = parameter.parameter
            return {"momentum_buffer": torch.zeros_like(tensor, memory_format=torch.preserve_format)}
        return self._adamw.initial_state(parameter)

    @property
    def _adamw(self) -> AdamW:
        from rlinf_core.optimizers.adamw import AdamW

        return AdamW(self.adamw_lr or self.lr, self.betas, self.eps, self.weight_decay)


class ConstantConfig(WarmupConfig):
    """Warm-up from 0, then constant: transformers' `constant_with_warmup`, RLinf's `constant`."""

    schedule: Literal["constant"] = "constant"
    not_here: ClassVar[Mapping[str, str]] = {
        "constant_with_warmup": 'it is optim.schedule = "constant"',
        "torch_constant": 'it is optim.schedule = "constant" with warmup_steps = 0',
    }
    warmup_steps: int = Field(default=1000, ge=0)
    """Steps from 0 to lr; 0: the learning rate is lr from the first step."""

    def lr_at(self, step: torch.Tensor) -> torch.Tensor:
        """Lr · min(1, step / warmup_steps)."""
        return _staged(step, self, start_lr=0.0)


class HfCosineConfig(DecayConfig):
    """transformers' `cosine` and `cosine_with_min_lr`, RLinf's `cosine`: warm-up from 0, then a cosine to `min_lr`."""

    schedule: Literal["hf_cosine"] = "hf_cosine"
    not_here: ClassVar[Mapping[str, str]] = {
        "cosine_with_min_lr": 'it is optim.schedule = "hf_cosine"',
        "torch_cosine": 'it is optim.schedule = "hf_cosine" with warmup_steps = 0 and min_lr = 1e-6',
    }
    min_lr: float = Field(default=0.0, ge=0)
    """Learning rate at the end of the cosine and after it."""
    warmup_steps: int = Field(default=1000, ge=0)
    """Steps from 0 to lr. With any, the first step changes no weight."""
    decay_steps: int = Field(default=30_000, ge=1)
    """Step, counted from 0, at which the cosine reaches `min_lr`: transformers' number of training steps."""

    def lr_at(self, step: torch.Tensor) -> torch.Tensor:
        """Half a cosine from `warmup_steps` to `decay_steps`."""
        return _staged(step, self, start_lr=0.0, min_lr=self.min_lr, decay_steps=self.decay_steps)


class WsdConfig(DecayConfig):
    """Warm-up, stable, decay: transformers' `warmup_stable_decay`."""

    schedule: Literal["wsd"] = "wsd"
    not_here: ClassVar[Mapping[str, str]] = {
        "warmup_stable_decay": 'it is optim.schedule = "wsd"',
        "linear": 'it is optim.schedule = "wsd" with stable_steps = 0, decay = "linear" and min_lr = 0',
    }
    min_lr: float = Field(default=0.0, ge=0)
    """Learning rate before the warm-up, and at the end of the decay and after it."""
    warmup_steps: int = Field(default=1000, ge=0)
    """Steps from `min_lr` to lr."""
    stable_steps: int = Field(ge=0)
    """Steps at lr between warm-up and decay."""
    decay_steps: int = Field(default=30_000, ge=1)
    """Step, counted from 0, at which the decay reaches `min_lr`: warm-up, stable and decaying steps together."""
    decay: Literal["cosine", "linear", "1-sqrt"] = "cosine"
    """Curve of the decay; `1-sqrt` falls by the root of the fraction of its steps that are done."""

    @model_validator(mode="after")
    def _decays_after_the_stable_steps(self) -> WsdConfig:
        if self.decay_steps <= (before := self.warmup_steps + self.stable_steps):
            raise ValueError(
                f"decay_steps ({self.decay_steps}) must be larger than warmup_steps + stable_steps ({before})"
            )
        return self

    def lr_at(self, step: torch.Tensor) -> torch.Tensor:
        """Three stages."""
        return _staged(
            step,
            self,
            start_lr=self.min_lr,
            min_lr=self.min_lr,
            stable_steps=self.stable_steps,
            decay_steps=self.decay_steps,
            curve=self.decay,
        )


def _staged(
    step: torch.Tensor,
    schedule: WarmupConfig,
    *,
    start_lr: float,
    min_lr: float = 0.0,
    stable_steps: int = 0,
    decay_steps: int = 0,
    curve: Literal["cosine", "linear", "1-sqrt"] = "cosine",
) -> torch.Tensor:
    from rlinf_core.optimizers.schedules import warmup_stable_decay

    return warmup_stable_decay(
        step.float(),
        lr=schedule.lr,
        start_lr=start_lr,
        min_lr=min_lr,
        warmup_steps=schedule.warmup_steps,
        stable_steps=stable_steps,
        decay_steps=decay_steps,
        curve=curve,
    )
