"""A causal language model of transformers with its loss.

The architecture's own code runs, with attention within documents (`attention`) and a chunked loss (`cross_entropy`);
neither changes the result. Axes: B samples, T tokens, N tokens of all samples, V vocabulary entries.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from rlinf_core import UserError
from rlinf_core.data.sample import Batch
from rlinf_plugins_text.model.attention import NAME
from rlinf_plugins_text.model.cross_entropy import HeadShape, liger_cross_entropy, linear_cross_entropy
from rlinf_plugins_text.model.isolation import check_isolation
from rlinf_plugins_text.vision.families import FAMILIES
from rlinf_plugins_text.weights.architecture import check_keys, model_config, refused_values

if TYPE_CHECKING:
    from rlinf_plugins_text.settings import TextPolicySettings

LINEAR_HEADS = frozenset(
    {"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "olmo2", "olmo3", "smollm3"}
    | {"gpt2", "gpt_neox", "cohere", "cohere2", "granite"}
)
"""Architectures whose logits are a linear function of the last hidden state, scaled or capped as in `_head_shape`;
their loss is computed in chunks. Other architectures compute all their logits at once, by their own code."""


OF_IMAGES = ("entries", "documents", "ends")
"""What a batch says of its images besides the model's inputs."""


class LanguageModel(nn.Module):
    """The model and its loss in one module, so that a head tied to the embedding is gathered once.

    Args:
        settings: The `[policy]` table.
        keeps_padding: Compute padding on the CPU as well, as on CUDA; for counting operations and memory.
    """

    def __init__(self, settings: TextPolicySettings, *, keeps_padding: bool = False) -> None:
        super().__init__()
        self._keeps_padding = keeps_padding
        self._documents = settings.attention == "documents"
        self._one_axis_more = settings.model_table().get("model_type") in ("smolvlm", "idefics3")
        self._max_length, self._liger = settings.max_length, settings.liger == "auto"
        table = {key: value for key, value in settings.model_table().items() if key not in ("torch_dtype", "dtype")}
        config = model_config(table)
        check_keys(settings.config, config)
        check_isolation(table, documents=self._documents, max_length=settings.max_length)
        attention: Any = NAME if self._documents else "sdpa"
        self.sees = config.model_type in FAMILIES
        if self.sees:
            attention = {"": attention, "text_config": attention, "vision_config": "sdpa"}
        auto: Any = AutoModelForImageTextToText if self.sees else AutoModelForCausalLM
        try:
            self.model: Any = auto.from_config(config, dtype=torch.float32, attn_implementation=attention)
        except (ValueError, TypeError, ArithmeticError, LookupError, RuntimeError) as error:
            raise refused_values(error) from error
        self.shape = _head_shape(config) if self.sees or config.model_type in LINEAR_HEADS else None

    @property
    def layers(self) -> list[nn.Module]:
        """The decoder's layers, in order."""
        return _longest_list(self._language_model if self.sees else self.model)

    @property
    def vision_blocks(self) -> list[nn.Module]:
        """The blocks of the vision tower, in order; empty for a model that reads only text."""
        if not self.sees:
            return []
        language = self._language_model
        towers = [part for part in self.model.base_model.children() if part is not language]
        return max(map(_longest_list, towers), key=len, default=[])

    def unread(self) -> set[int]:
        """The parameters on which no loss depends, by `id`: LLaVA's last vision layers, whose outputs are not read."""
        layer = getattr(self.model.config, "vision_feature_layer", None)
        if not self.sees or not isinstance(layer, int):
            return set()
        blocks = self.vision_blocks
        read = layer if layer >= 0 else len(blocks) + 1 + layer
        modules = [*blocks[read:], *(m for n, m in self.model.named_modules() if n.endswith("post_layernorm"))]
        return {id(parameter) for module in modules for parameter in module.parameters()}

    @property
    def _language_model(self) -> nn.Module:
        base = self.model.base_model
        found: nn.Module = base.text_model if hasattr(base, "text_model") else base.language_model
        return found

    def forward(self, batch: Batch, last: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Summed loss of the trained tokens, and how many of them the model ranks first: float32 scalars.

        With `last` [B], the position of a token in each sample: float32 logits [B, V] of the next token, and their
        argmax [B].
        """
        if last is not None:
            logits = self._next_logits(batch, last)
            return logits, logits.argmax(-1)
        inputs, tokens, predicting = self._laid_out(batch)
        # Position t predicts t + 1. The first token of a text is never trained, so no prediction crosses texts.
        targets = tokens.flatten().index_select(0, predicting + 1)
        if self.shape is None:
            logits = self.model(**inputs, use_cache=False).logits.flatten(0, 1).index_select(0, predicting).float()
            loss = nn.functional.cross_entropy(logits, targets, reduction="sum")
            return loss, (logits.detach().argmax(-1) == targets).sum().float()
        hidden = self.model.base_model(**inputs, use_cache=False).last_hidden_state
        head = self.model.get_output_embeddings()
        chosen = hidden.flatten(0, 1).index_select(0, predicting).to(head.weight.dtype)
        kernel = liger_cross_entropy(self.shape) if self._liger and chosen.is_cuda else None
        return (kernel or linear_cross_entropy)(chosen, head.weight, targets, self.shape, head.bias)

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
        """The model's inputs, the tokens, [1, N] as documents or [B, T] when padded, and the positions among these
        B·T or N that predict a trained token.
        """
        tokens, predicting, lengths = batch["tokens"], batch["packing"]["predicting"], batch["document_lengths"]
        images = batch["packing"].get("images", {})
        seen = {key: value for key, value in images.items() if key not in OF_IMAGES}
        if self._one_axis_more and seen:  # They have an axis for the samples of a batch, over which images are joined.
            seen = {key: value[None] for key, value in seen.items()}
        grids = batch["positions"].ndim == 3
        if not self._documents:  # Padding comes last, where a causal model does not see it.
            if grids:
                seen["position_ids"] = batch["positions"].transpose(0, 1)
            if "token_types" in batch:
                seen["token_type_ids"] = batch["token_types"]
            return {"input_ids": tokens, **seen}, tokens, predicting
        if "token_types" in batch:
            raise UserError(
                f"{type(self.model).__name__} lets tokens see later ones, as it does within an image: set "
                'policy.attention = "padded" and policy.packing = false'
            )
        flat = [tokens.flatten()]
        flat += [batch["positions"].transpose(0, 1).flatten(1) if grids else batch["positions"].flatten()]
        if tokens.device.type == "cpu" and not (keep_padding or self._keeps_padding):
            # Not on CUDA: the host would wait for the device, and every batch would have a shape of its own.
            real = (torch.arange(tokens.shape[1]) < tokens.shape[1] - lengths[:, -1:]).flatten()
            flat = [one[..., real] for one in flat]
            lengths, predicting = lengths[:, :-1], (real.cumsum(0) - 1)[predicting]
        ends = nn.functional.pad(lengths.flatten().cumsum(0, dtype=torch.int32), (1, 0))
        tokens, positions = (one.unsqueeze(-2) for one in flat)
        # The same bound for all batches of a run: compiled code would treat another number as another shape.
        longest = max(self._max_length, batch["tokens"].shape[1])
        inputs = {"input_ids": tokens, "position_ids": positions, "documents": ends, "longest": longest, **seen}
        return inputs, tokens, predicting


def _longest_list(module: nn.Module) -> list[nn.Module]:
    """The longest list of modules in a module: its layers."""
    lists = [list(m) for m in module.modules() if isinstance(m, nn.ModuleList)]
    return max(lists, key=len, default=[])


def _head_shape(config: Any) -> HeadShape:
    """How the head's outputs become logits; Cohere and Granite scale them, Gemma 2 caps them."""
    scale = 1.0
    if config.model_type in ("cohere", "cohere2"):
        scale = float(config.logit_scale)
    if config.model_type == "granite":
        scale = 1.0 / float(config.logits_scaling)
    return HeadShape(scale, float(getattr(config, "final_logit_softcapping", None) or 0.0))
