"""The policy `text`: a language model as rlinf_core trains it.

The interface to the trainer: loss on a batch, shard units, initial values, answers to held-out prompts. What is
computed is in `language_model`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlinf_core import PolicyOutput, ShardUnit, UserError
from rlinf_core.data.sample import Batch
from rlinf_plugins_text.model.generation import answers
from rlinf_plugins_text.model.language_model import LanguageModel

if TYPE_CHECKING:
    from rlinf_plugins_text.settings import TextPolicySettings


UNSET = -(2**31)
"""Value of integer buffers until they are initialised."""


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
        """The embedding (unless tied to the head), each block of a vision tower, each layer, and the rest."""
        model = self.lm.model
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        if head is None or head.weight is not embedding.weight:
            yield ShardUnit(embedding, read_in_backward=False)
        yield from (ShardUnit(block, block=True) for block in self.lm.vision_blocks)
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
            initialise = self._initialiser(owner)._init_weights
            if self.lm.sees:  # Parts of vision towers initialise the layers inside of them.
                twin._modules = _inner_without_values(self.get_submodule(owner))
            initialise(twin)
            around, _, place = owner.rpartition(".")
            if self.lm.sees and place and around:
                outer = copy.copy(self.get_submodule(around))
                outer._modules = {**_inner_without_values(outer), place: twin}
                initialise(outer)
        return value.detach()

    def _initialiser(self, name: str) -> Any:
        """The model that initialises a module: the nearest one around it, as a vision tower is a model by itself."""
        while name:
            if isinstance(module := self.get_submodule(name), PreTrainedModel):
                return module
            name = name.rpartition(".")[0]
        return self.lm.model

    @torch.no_grad()
    def rebuild_buffers(self) -> None:
        """Recompute rotary frequencies and embedding scales as the architecture initialises them.

        Raises:
            UserError: The code of the architecture leaves a buffer uninitialised.
        """
        # Vision towers keep the numbers of their positions in integers.
        wanted = (torch.float32, torch.bfloat16, torch.float16, *([torch.int64] if self.lm.sees else []))
        buffers = {name: buffer for name, buffer in self.named_buffers() if buffer.dtype in wanted}
        for buffer in buffers.values():
            buffer.fill_(math.nan if buffer.is_floating_point() else UNSET)
        for parameter in self.parameters():
            parameter._is_hf_initialized = True  # type: ignore[attr-defined]
        for name, module in self.named_modules():
            if any(True for _ in module.named_buffers(recurse=False)):
                self._initialiser(name)._init_weights(module)
        if left := [name for name in buffers if _is_unset(self.get_buffer(name))]:
            raise UserError(
                f"policy.weights: {type(self.lm.model).__name__} does not initialise "
                f"{left[0].removeprefix('lm.model.')}, which is no parameter; this architecture cannot be trained"
            )


def _inner_without_values(module: nn.Module) -> dict[str, nn.Module | None]:
    """Copies of the modules in a module, on the meta device."""
    inner: dict[str, nn.Module | None] = {}
    for name, one in module.named_children():
        twin = inner[name] = copy.copy(one)
        twin._parameters = {
            key: None if p is None else nn.Parameter(torch.empty(p.shape, device="meta"))
            for key, p in one._parameters.items()
        }
        twin._modules = _inner_without_values(one)
    return inner


def _is_unset(buffer: Tensor) -> bool:
    return bool((buffer.isnan() if buffer.is_floating_point() else buffer == UNSET).any())
