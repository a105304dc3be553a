"""Draw action chunks with a policy's module: in how many steps, compiled or as written."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch

from rlinf_core.contract.policy import PolicyConfig
from rlinf_core.data.sample import Batch
from rlinf_core.errors import UserError
from rlinf_core.torch_names import raise_recompile_limit

MOST_STEPS = 100
"""Largest number of steps: more cost time and change nothing."""


VARIANTS = 64
"""Graphs of a step: one per batch size and policy. Torch's default, 8, is too few for several loaded policies."""


class EagerSampling(UserWarning):
    """Sampling was to be compiled, and is computed as written."""


class Sampler:
    """Calls `sample_actions`.

    Args:
        config: The policy.
        module: Its module.
        steps: Denoising steps of a chunk; None: the config's.
        compiled: Compile a step. If that fails, for example because there is no C++ compiler, it is computed as
            written, with one warning.

    Raises:
        UserError: The policy cannot do that.
    """

    def __init__(self, config: PolicyConfig, module: Any, *, steps: int | None = None, compiled: bool = False) -> None:
        self.config, self.module = config, module
        self.steps = check_steps(config, steps)
        if compiled:
            raise_recompile_limit(VARIANTS)
        if compiled and not config.compile_sampling(module, on=True):
            raise UserError(f"the policy {config.type!r} cannot be compiled for inference: leave out --compile")
        self.compiled = compiled
        """Whether a step is compiled: when it is first used, once for each batch size."""

    def __call__(self, batch: Batch, noise: torch.Tensor, steps: int | None = None) -> torch.Tensor:
        """Draw action chunks.

        Args:
            batch: Observations, on the module's device.
            noise: [B, H, A].
            steps: Denoising steps, checked by `check_steps`; None: the sampler's own.

        Returns:
            [B, H, A] normalised actions, float32.
        """
        number = self.steps if steps is None else steps
        options = {} if number is None else {"num_steps": number}
        with torch.inference_mode():
            try:
                actions: torch.Tensor = self.module.sample_actions(batch, noise, **options)
            except Exception as error:
                if not self.compiled:
                    raise
                self.config.compile_sampling(self.module, on=False)
                try:
                    actions = self.module.sample_actions(batch, noise, **options)
                except Exception:  # Compilation is not to blame.
                    self.config.compile_sampling(self.module, on=True)
                    raise
                self._stopped_compiling(error)
        return actions

    def _stopped_compiling(self, error: Exception) -> None:
        self.compiled = False
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = " ".join(lines[:2]) or type(error).__name__
        warnings.warn(
            f"actions are computed without compilation, because torch.compile failed: {reason[:300]}",
            EagerSampling,
            stacklevel=2,
        )


def check_steps(config: PolicyConfig, steps: object, name: str = "steps") -> int | None:
    """A number of denoising steps that a caller chose; None: none.

    Raises:
        UserError: The policy has no steps, or not as many.
    """
    if steps is None:
        return None
    if not config.sampling_steps():
        raise UserError(f"{name}: the policy {config.type!r} does not draw actions in steps: leave it out")
    whole = isinstance(steps, (int, np.integer)) and not isinstance(steps, bool)
    if not whole or not 1 <= int(steps) <= MOST_STEPS:  # type: ignore[call-overload]
        raise UserError(f"{name} is {str(steps)[:40]!r}, but must be a whole number from 1 to {MOST_STEPS}")
    return int(steps)  # type: ignore[call-overload]
