"""The policy `text`: a language model as rlinf_core trains it.

The interface to the trainer: loss on a batch, shard units, initial values, answers to held-out prompts. What is
computed is in `language_model`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rlinf_core import PolicyOutput, ShardUnit, UserError
from rlinf_core.data.sample import Batch
from rlinf_plugins_text.model.generation import answers
from rlinf_plugins_text.model.language_model import LanguageModel

if TYPE_CHECKING:
    from rlinf_plugins_text.settings import TextPolicySettings


class TextPolicy(nn.Module):
    """The policy's module; see `rlinf_core.Policy`.

    Args:
        settings: The `[policy]` table.
        to_count: Build it for counting operations and memory: skip the tokenizer, keep padding on every device.
    """

    forward_methods = ("answers",)
    """Methods other than `forward` that compute with parameters."""

    def __init__(self, settings: TextPolicySettings, *, to_count: bool = False) -> None:
        super().__init__()
        if not to_count:
            settings.check_vocabulary()
        self.lm = LanguageModel(settings, keeps_padding=to_count)
        self._settings = settings

    def forward(self, batch: Batch) -> PolicyOutput:
        """Summed loss of the trained tokens; `token_accuracy` counts those that the model ranks first."""
        loss, hits = self.lm(batch)
        return PolicyOutput(loss, batch["trained"].sum().float(), {"token_accuracy": hits})

    def answers(self, batch: Batch) -> list[str]:
        """The model's answer to the first prompt of each sample, next to the answer in the data."""
        return answers(self.lm, batch, self._settings)

    def shard_units(self) -> Iterator[ShardUnit]:
        """The embedding (unless tied to the head), each layer, and the rest: final norm and head."""
        model = self.lm.model
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        if head is None or head.weight is not embedding.weight:
            yield ShardUnit(embedding, read_in_backward=False)
        yield from (ShardUnit(layer, block=True) for layer in self.lm.layers)
        yield ShardUnit(self.lm)

    def initial_value(self, name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """The architecture's own initial value of this parameter, drawn from `generator` alone."""
        owner, _, own = name.rpartition(".")
        twin = copy.copy(self.get_submodule(owner))
        twin._parameters = {
            key: None if p is None else nn.Parameter(torch.zeros(p.shape, device="cpu"))
            for key, p in twin._parameters.items()
        }
        value = twin._parameters[own] = nn.Parameter(torch.zeros(shape, device="cpu"))
        twin._modules = {}
        twin._buffers = {
            key: None if b is None else torch.zeros_like(b, device="cpu") for key, b in twin._buffers.items()
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
            self.lm.model._init_weights(twin)
        return value.detach()

    @torch.no_grad()
    def rebuild_buffers(self) -> None:
        """Recompute rotary frequencies and embedding scales as the architecture initialises them.

        Raises:
            UserError: The code of the architecture leaves a buffer uninitialised.
        """
        buffers = {name: b for name, b in self.named_buffers() if b.is_floating_point()}
        for buffer in buffers.values():
            buffer.fill_(math.nan)
        for parameter in self.parameters():
            parameter._is_hf_initialized = True  # type: ignore[attr-defined]
        for module in self.lm.model.modules():
            if any(True for _ in module.named_buffers(recurse=False)):
                self.lm.model._init_weights(module)
        if left := [name for name in buffers if self.get_buffer(name).isnan().any()]:
            raise UserError(
                f"policy.weights: {type(self.lm.model).__name__} does not initialise "
                f"{left[0].removeprefix('lm.model.')}, which is no parameter; this architecture cannot be trained"
            )
