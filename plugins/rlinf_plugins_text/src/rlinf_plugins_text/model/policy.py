"""A causal language model of transformers as a policy: its loss on texts, its shard units, its values.

The architecture's own code runs, with attention within documents (`attention`) and the loss of `cross_entropy`; neither
changes what it computes. Axes: B samples, T tokens, N tokens of all samples, W width.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from rlinf_core import PolicyOutput, ShardUnit, UserError
from rlinf_core.data.sample import Batch
from rlinf_plugins_text.model.attention import NAME
from rlinf_plugins_text.model.cross_entropy import HeadShape, linear_cross_entropy
from rlinf_plugins_text.model.generation import answers
from rlinf_plugins_text.model.liger import liger_cross_entropy
from rlinf_plugins_text.weights.model import check_keys, model_config, refused_values

if TYPE_CHECKING:
    from rlinf_plugins_text.config import TextPolicyConfig

LINEAR_HEADS = frozenset(
    {"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "olmo2", "olmo3", "smollm3"}
    | {"gpt2", "gpt_neox", "cohere", "cohere2", "granite"}
)
"""Architectures whose logits are a linear layer of the last hidden state, scaled or capped as `_head_shape` says; their
loss is computed in chunks. Others make their logits themselves, all at once."""


class TextPolicy(nn.Module):
    """The policy; see `rlinf_core.Policy`."""

    def __init__(self, config: TextPolicyConfig, *, to_count: bool = False) -> None:
        super().__init__()
        if not to_count:
            config.check_vocabulary()
        self.lm = LanguageModel(config, keeps_padding=to_count)
        self._config = config

    def forward(self, batch: Batch) -> PolicyOutput:
        """The loss of the trained tokens, and how many the likeliest one hits (`token_accuracy`)."""
        loss, hits = self.lm(batch)
        return PolicyOutput(loss, batch["trained"].sum().float(), {"token_accuracy": hits})

    def demonstrate(self, batch: Batch) -> list[str]:
        """How the model answers the first prompt of each sample, beside what the data say."""
        return answers(self.lm, batch, self._config)

    def shard_units(self) -> Iterator[ShardUnit]:
        """The embedding, unless the head is the same; each layer; and the rest, norm and head."""
        model = self.lm.model
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        if head is None or head.weight is not embedding.weight:
            yield ShardUnit(embedding)
        yield from (ShardUnit(layer, block=True) for layer in self.lm.layers)
        yield ShardUnit(self.lm)

    def initial_value(self, name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """What the architecture's own initialisation gives this parameter, drawn from `generator` alone."""
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
        """Rotary frequencies and scales of embeddings, as the architecture initialises them."""
        for parameter in self.parameters():
            parameter._is_hf_initialized = True  # type: ignore[attr-defined]
        for module in self.lm.model.modules():
            if any(buffer is not None for buffer in module._buffers.values()):
                self.lm.model._init_weights(module)


class LanguageModel(nn.Module):
    """The model with its loss, in one unit: a head that is the embedding is gathered once.

    Args:
        config: The policy's.
        keeps_padding: Compute padding on the CPU, too, as CUDA does: for what is counted instead of computed.
    """

    def __init__(self, config: TextPolicyConfig, *, keeps_padding: bool = False) -> None:
        super().__init__()
        self._keeps_padding = keeps_padding
        self._documents = config.attention == "documents"
        self._max_length, self._liger = config.max_length, config.liger == "auto"
        table = {key: value for key, value in config.model_table().items() if key not in ("torch_dtype", "dtype")}
        settings = model_config(table)
        check_keys(config.config, settings)
        try:
            self.model: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                settings, dtype=torch.float32, attn_implementation=NAME if self._documents else "sdpa"
            )
        except (ValueError, TypeError, ArithmeticError, LookupError, RuntimeError) as error:
            raise refused_values(error) from error
        if self._documents and not self.model._supports_attention_backend:
            raise UserError(
                f"{type(self.model).__name__} has attention of its own, or none, which cannot be kept within texts: "
                'set policy.attention = "padded"'
            )
        self.shape = _head_shape(settings) if settings.model_type in LINEAR_HEADS else None

    @property
    def layers(self) -> list[nn.Module]:
        """The decoder's layers, in order."""
        lists = [list(m) for m in self.model.modules() if isinstance(m, nn.ModuleList)]
        return max(lists, key=len, default=[])

    def forward(self, batch: Batch, last: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Summed loss and hits of the trained tokens, float32 scalars.

        With `last` [B] instead: logits [B, V] of what follows that token of each sample, float32, and the likeliest.
        """
        if last is not None:
            logits = self._next_logits(batch, last)
            return logits, logits.argmax(-1)
        inputs, tokens, trained = self._laid_out(batch)
        # What stands at t predicts t + 1; the first token of a text is never trained, so nothing crosses texts.
        counts, targets = trained[..., 1:], tokens[..., 1:]
        if self.shape is None:
            logits = self.model(**inputs, use_cache=False).logits[..., :-1, :][counts].float()
            chosen = targets[counts]
            loss = nn.functional.cross_entropy(logits, chosen, reduction="sum")
            return loss, (logits.detach().argmax(-1) == chosen).sum().float()
        hidden = self.model.base_model(**inputs, use_cache=False).last_hidden_state
        head = self.model.get_output_embeddings()
        chosen = hidden[..., :-1, :][counts].to(head.weight.dtype)
        kernel = liger_cross_entropy(self.shape) if self._liger and chosen.is_cuda else None
        return (kernel or linear_cross_entropy)(chosen, head.weight, targets[counts], self.shape, head.bias)

    def _next_logits(self, batch: Batch, last: Tensor) -> Tensor:
        inputs, _, _ = self._laid_out(batch, keep_padding=True)
        rows, length = batch["tokens"].shape
        places = last + torch.arange(rows, device=last.device) * length
        if self.shape is None:
            every: Tensor = self.model(**inputs, use_cache=False).logits
            return every.flatten(0, 1)[places].float()
        hidden = self.model.base_model(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)[places]
        head = self.model.get_output_embeddings()
        logits: Tensor = head(hidden.to(head.weight.dtype)).float() * self.shape.scale
        return self.shape.softcap * torch.tanh(logits / self.shape.softcap) if self.shape.softcap else logits

    def _laid_out(self, batch: Batch, *, keep_padding: bool = False) -> tuple[Mapping[str, Any], Tensor, Tensor]:
        """The model's inputs, the tokens and what is trained: [1, N] in documents, [B, T] side by side."""
        tokens, trained, lengths = batch["tokens"], batch["trained"], batch["document_lengths"]
        if not self._documents:  # Padding follows the texts: causal models do not see it.
            return {"input_ids": tokens}, tokens, trained
        flat = [tokens.flatten(), batch["positions"].flatten(), trained.flatten()]
        if tokens.device.type == "cpu" and not (keep_padding or self._keeps_padding):
            # Not on CUDA: it would wait for the device to say how much is left, and every batch would have its shape.
            real = torch.arange(tokens.shape[1]) < tokens.shape[1] - lengths[:, -1:]
            flat = [one[real.flatten()] for one in flat]
            lengths = lengths[:, :-1]
        ends = nn.functional.pad(lengths.flatten().cumsum(0, dtype=torch.int32), (1, 0))
        tokens, positions, trained = (one[None] for one in flat)
        # A bound that is the same for all batches of a run: compiled code would see another number as another shape.
        longest = max(self._max_length, batch["tokens"].shape[1])
        inputs = {"input_ids": tokens, "position_ids": positions, "documents": ends, "longest": longest}
        return inputs, tokens, trained


def _head_shape(settings: Any) -> HeadShape:
    """How Cohere, Granite and Gemma 2 turn the head's outputs into logits."""
    scale = 1.0
    if settings.model_type in ("cohere", "cohere2"):
        scale = float(settings.logit_scale)
    if settings.model_type == "granite":
        scale = 1.0 / float(settings.logits_scaling)
    return HeadShape(scale, float(getattr(settings, "final_logit_softcapping", None) or 0.0))
