"""lerobot's training step of π0 and π0.5, in sizes of ours as well. Needs lerobot, transformers and torch.

Left out is what surrounds the model in its loop: reading, preprocessing, logging.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

import torch

from policy_step import peer_sizes
from policy_step.cases import padded
from policy_step.peer_sizes import gemma_sizes
from policy_step.timing import tensors

if TYPE_CHECKING:
    from rlinf_plugins_openpi.model.dimensions import Pi0Dimensions


CLASSES = ("PaliGemmaForConditionalGenerationWithPiGemma", "PiGemmaForCausalLM")


@contextlib.contextmanager
def of_size(dimensions: Pi0Dimensions) -> Iterator[Any]:
    """The module of π0 or π0.5; while the body runs, it builds models of these sizes."""
    name = "pi05" if dimensions.pi05 else "pi0"
    modeling = importlib.import_module(f"lerobot.policies.{name}.modeling_{name}")
    before = modeling.get_gemma_config
    try:
        modeling.get_gemma_config = functools.partial(gemma_sizes, dimensions)
        with peer_sizes.of_size(dimensions, modeling, CLASSES):
            yield modeling
    finally:
        modeling.get_gemma_config = before


def build(
    dimensions: Pi0Dimensions,
    *,
    dtype: Literal["float32", "bfloat16"] = "float32",
    device: str | None = None,
    compiled: bool = False,
) -> Any:
    """The core model, `PI0Pytorch` or `PI05Pytorch`, with arbitrary values; None: on torch's default device.

    `compiled` is lerobot's `compile_model` in torch's default mode: `max-autotune`, its own, would search for minutes.
    """
    with of_size(dimensions) as modeling, torch.device(device or torch.get_default_device()):
        config = (modeling.PI05Config if dimensions.pi05 else modeling.PI0Config)(
            chunk_size=dimensions.action_horizon,
            n_action_steps=dimensions.action_horizon,
            max_state_dim=dimensions.action_dim,
            max_action_dim=dimensions.action_dim,
            device=device or "cpu",
            dtype=dtype,
            compile_model=compiled,
            compile_mode="default",
        )
        torch.manual_seed(0)
        model = (modeling.PI05Pytorch if dimensions.pi05 else modeling.PI0Pytorch)(config)
        return model if device is None else model.to(device)


class LerobotStep:
    """An optimizer step of lerobot: its loss, backward pass, clipping and AdamW, as `lerobot-train` does them.

    Args:
        model: What `build` returned; several steps may share it.
        optimizer: Its optimizer, from `optimizer_of`.
        samples: The samples of a step.
        micro_batch: Samples that go through the model at a time.
        slots: Cameras that the model is given: those of the samples and `empty_cameras` more.
        checkpointing: `gradient_checkpointing` of its config.
    """

    def __init__(
        self,
        model: Any,
        optimizer: torch.optim.Optimizer,
        samples: list[dict[str, Any]],
        *,
        micro_batch: int,
        slots: int,
        checkpointing: bool = False,
    ) -> None:
        self.model, self.optimizer, self.checkpointing = model, optimizer, checkpointing
        device = next(model.parameters()).device
        starts = range(0, len(samples), micro_batch)
        self.batches = [tensors(padded(samples[i : i + micro_batch], slots), device) for i in starts]

    def loss(self, batch: dict[str, Any]) -> torch.Tensor:
        """The mean loss of a batch."""
        state = (batch["state"],) if hasattr(self.model, "state_proj") else ()
        read = (batch["images"], batch["image_masks"], batch["tokens"], batch["token_mask"], *state)
        losses: torch.Tensor = self.model.forward(*read, batch["actions"], batch["noise"], batch["time"])
        return losses.mean()

    def __call__(self) -> torch.Tensor:
        """One step; the loss is read on the host, as in lerobot's loop."""
        self.model.train()
        self.say_checkpointing()
        total = torch.zeros((), device=self.batches[0]["time"].device)
        for batch in self.batches:
            loss = self.loss(batch) / len(self.batches)
            loss.backward()
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.model.config.optimizer_grad_clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        total.item(), norm.item()
        return total

    def say_checkpointing(self) -> None:
        """Switch gradient checkpointing of the shared model."""
        kind = "enable" if self.checkpointing else "disable"
        if self.model.gradient_checkpointing_enabled != self.checkpointing:
            getattr(self.model, f"gradient_checkpointing_{kind}")()


def optimizer_of(model: Any) -> torch.optim.Optimizer:
    """The optimizer of lerobot's own preset for the policy."""
    optimizer: torch.optim.Optimizer = model.config.get_optimizer_preset().build(model.parameters())
    return optimizer
