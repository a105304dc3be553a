"""Answers to held-out prompts, for people to read while training. All ranks compute the same answers, in lockstep."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlinf_core.data.sample import Batch

if TYPE_CHECKING:
    from rlinf_plugins_text.model.language_model import LanguageModel
    from rlinf_plugins_text.settings import TextPolicySettings

SEED = 0
"""Seed of sampled answers: the same random numbers at each validation."""
PROMPT_SHOWN = 200
"""Characters shown of a prompt, from its end."""
STEP = 64
"""Lengths are rounded up to a multiple of this many tokens, so that compiled code sees few shapes."""


@torch.no_grad()
def answers(model: LanguageModel, batch: Batch, settings: TextPolicySettings) -> list[str]:
    """One line per sample: the end of its prompt, the model's answer, and the answer in the data.

    There is no key-value cache: the model reads the whole text again for each token, which a few dozen tokens per
    validation can afford.
    """
    tokenizer = settings.text_tokenizer()
    device = batch["tokens"].device
    prompts, wanted = zip(*(_prompt(batch, row) for row in range(len(batch["tokens"]))), strict=True)
    texts = [prompt.tolist() for prompt in prompts]
    begins = [len(text) for text in texts]
    generator = torch.Generator().manual_seed(SEED)
    # Always `shown_tokens` steps, even past the end of a text: ranks must call the sharded model equally often.
    for _ in range(settings.shown_tokens):
        logits = _next_logits(model, texts, device)
        for text, token in zip(texts, _choose(logits.cpu(), settings.temperature, generator), strict=True):
            text.append(token)
    end = tokenizer.id_of("eos_token")
    lines = []
    for text, begin, target in zip(texts, begins, wanted, strict=True):
        answer = text[begin:]
        if end in answer:
            answer = answer[: answer.index(end) + 1]
        prompt, said, data = (tokenizer.decode(one) for one in (text[:begin], answer, target.tolist()))
        lines.append(f"{prompt[-PROMPT_SHOWN:]} ⟦{said}⟧ (data: {data[:PROMPT_SHOWN]})".replace("\n", "↵"))
    return lines


def _next_logits(model: LanguageModel, texts: list[list[int]], device: torch.device) -> Tensor:
    """Logits [B, V] of the token after each text."""
    length = -(-max(map(len, texts)) // STEP) * STEP
    tokens = torch.zeros(len(texts), length, dtype=torch.int64)
    for row, text in enumerate(texts):
        tokens[row, : len(text)] = torch.tensor(text)
    sizes = torch.tensor([len(text) for text in texts])
    positions = torch.arange(length).expand(len(texts), -1)
    lengths = torch.stack([sizes, length - sizes], dim=1).to(torch.int32)
    # The positions of padding simply continue; nothing uses them.
    batch = {"tokens": tokens, "positions": positions, "document_lengths": lengths}
    on_device: dict[str, Any] = {name: tensor.to(device) for name, tensor in batch.items()}
    on_device["packing"] = {"predicting": sizes[:0]}  # There is no loss.
    logits: Tensor = model(on_device, (sizes - 1).to(device))[0]
    return logits


def _prompt(batch: Batch, row: int) -> tuple[Tensor, Tensor]:
    """The first text of a sample, split where its trained part begins: prompt (at least one token) and answer."""
    length = int(batch["document_lengths"][row, 0])
    tokens, trained = (batch[name][row, :length].cpu() for name in ("tokens", "trained"))
    first = max(1, int(trained.int().argmax()))
    return tokens[:first], tokens[first:]


def _choose(logits: Tensor, temperature: float, generator: torch.Generator) -> list[int]:
    if not temperature:
        return [int(one) for one in logits.argmax(-1)]
    probabilities = (logits / temperature).softmax(-1)
    return [int(one) for one in torch.multinomial(probabilities, 1, generator=generator)[:, 0]]
