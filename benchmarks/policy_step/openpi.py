"""The training step of openpi's PyTorch port of π0 and π0.5. Needs openpi, transformers with its changes, and torch.

openpi imports JAX for a table of sizes and for resizing, of which nothing runs here: both are given instead, so that
its environment needs no JAX. Left out is what surrounds the model in its loop, and its image changes, as in ours.
"""

from __future__ import annotations

import functools
import importlib
import sys
import types
from typing import TYPE_CHECKING, Any, Literal

import torch

from policy_step import peer_sizes
from policy_step.cases import ACTION_DIM, padded
from policy_step.peer_sizes import gemma_sizes
from policy_step.timing import tensors

if TYPE_CHECKING:
    from rlinf_plugins_openpi.model.dimensions import Pi0Dimensions

CLASSES = ("PaliGemmaForConditionalGeneration", "GemmaForCausalLM")


def build(dimensions: Pi0Dimensions, *, dtype: Literal["float32", "bfloat16"], device: str) -> Any:
    """The model `PI0Pytorch` with arbitrary values."""
    if dimensions.action_dim != ACTION_DIM:
        raise ValueError(f"openpi's model takes actions of {ACTION_DIM} numbers, not {dimensions.action_dim}")
    sizes, images = types.ModuleType("openpi.models.gemma"), types.ModuleType("openpi.shared.image_tools")
    sizes.get_config = functools.partial(gemma_sizes, dimensions)  # type: ignore[attr-defined]
    images.resize_with_pad_torch = None  # type: ignore[attr-defined]  # Images have the model's size.
    sys.modules |= {module.__name__: module for module in (sizes, images)}
    for package, name, module in (("openpi.models", "gemma", sizes), ("openpi.shared", "image_tools", images)):
        setattr(importlib.import_module(package), name, module)
    port = importlib.import_module("openpi.models_pytorch.pi0_pytorch")
    config = types.SimpleNamespace(
        pi05=dimensions.pi05,
        paligemma_variant=peer_sizes.VLM,
        action_expert_variant=peer_sizes.EXPERT,
        dtype=dtype,
        action_horizon=dimensions.action_horizon,
        action_dim=dimensions.action_dim,
    )
    classes = importlib.import_module("openpi.models_pytorch.gemma_pytorch")
    torch.manual_seed(0)
    with peer_sizes.of_size(dimensions, classes, CLASSES), torch.device(device):
        return port.PI0Pytorch(config).to(device)


class OpenpiStep:
    """An optimizer step of openpi's `train_pytorch.py`: gradient checkpointing always, AdamW, clipping.

    Args:
        model: What `build` returned.
        samples: The samples of a step.
        micro_batch: Samples that go through the model at a time.
    """

    def __init__(self, model: Any, samples: list[dict[str, Any]], *, micro_batch: int) -> None:
        self.model = model
        device = next(model.parameters()).device
        starts = range(0, len(samples), micro_batch)
        self.batches = [tensors(padded(samples[i : i + micro_batch], 3), device) for i in starts]
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=2.5e-5, betas=(0.9, 0.95), eps=1e-8, weight_decay=1e-10
        )
        model.gradient_checkpointing_enable()
        as_it_is = model._preprocess_observation
        model._preprocess_observation = lambda observation, train: as_it_is(observation, train=False)

    def loss(self, batch: dict[str, Any]) -> torch.Tensor:
        """The mean loss of a batch."""
        names = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
        observation = types.SimpleNamespace(
            images=dict(zip(names, batch["images"], strict=True)),
            image_masks=dict(zip(names, batch["image_masks"], strict=True)),
            state=batch["state"],
            tokenized_prompt=batch["tokens"],
            tokenized_prompt_mask=batch["token_mask"],
            token_ar_mask=None,
            token_loss_mask=None,
        )
        losses: torch.Tensor = self.model(observation, batch["actions"], noise=batch["noise"], time=batch["time"])
        return losses.mean()

    def __call__(self) -> torch.Tensor:
        """One step; the loss is read on the host, as in openpi's loop."""
        self.model.train()
        total = torch.zeros((), device=self.batches[0]["time"].device)
        for batch in self.batches:
            loss = self.loss(batch) / len(self.batches)
            loss.backward()
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), max_norm=1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        total.item(), float(norm)
        return total
