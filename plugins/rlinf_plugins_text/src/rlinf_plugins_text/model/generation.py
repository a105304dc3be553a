"""Answers to held-out prompts, for people to read while training. All ranks compute the same answers, in lockstep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlinf_core.data.sample import Batch
from rlinf_plugins_text.model.language_model import OF_IMAGES

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
    # The row of a blank image, which a batch without images has, is no sample.
    rows = torch.nonzero(batch["trained"].any(1))[:, 0].tolist()
    prompts, wanted = zip(*(_prompt(batch, row) for row in rows), strict=True)
    texts = [prompt.tolist() for prompt in prompts]
    begins = [len(text) for text in texts]
    seen = _Seen.of(batch, dict(zip(rows, begins, strict=True)))
    generator = torch.Generator().manual_seed(SEED)
    # Always `shown_tokens` steps, even past the end of a text: ranks must call the sharded model equally often.
    for _ in range(settings.shown_tokens):
        logits = _next_logits(model, texts, device, seen)
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


@dataclass(frozen=True)
class _Seen:
    """What of a batch belongs to the images of its prompts."""

    prompts: list[int]
    """[B], tokens of each prompt."""
    images: dict[str, Tensor]
    """The model's inputs for the images of the prompts."""
    positions: Tensor | None
    """[B, 3, T]; None: positions count tokens."""
    types: Tensor | None
    """[B, T]; None: a token sees all earlier ones."""

    @classmethod
    def of(cls, batch: Batch, prompts: Mapping[int, int]) -> _Seen | None:
        """Those of some rows of a batch, each with the length of its prompt; None if the model reads only text."""
        given = batch["packing"].get("images")
        if given is None:
            return None
        places = zip(given["documents"].tolist(), given["ends"].tolist(), strict=True)
        chosen = [i for i, ((row, _), end) in enumerate(places) if row in prompts and end <= prompts[row]]
        entries: list[int] = given["entries"].tolist()
        images: dict[str, Tensor] = {}
        for name, tensor in given.items():
            if name not in OF_IMAGES and chosen:
                parts = tensor.split(entries) if len(tensor) == sum(entries) else tensor.split(1)
                images[name] = torch.cat([parts[number] for number in chosen])
        rows = list(prompts)
        positions = batch["positions"][rows].cpu() if batch["positions"].ndim == 3 else None
        types = batch["token_types"][rows].cpu() if "token_types" in batch else None
        return cls(list(prompts.values()), images, positions, types)

    def inputs(self, length: int) -> dict[str, Tensor]:
        """Positions and types of texts of this length, which begin with the prompts and go on with words."""
        found: dict[str, Tensor] = {}
        if self.positions is not None:
            rows = zip(self.positions, self.prompts, strict=True)
            found["positions"] = torch.stack([_continued(row[:, :size], length) for row, size in rows])
        if self.types is not None:  # Words have the type of what ends a sample.
            found["token_types"] = self.types[:, -1:].amax(0).expand(len(self.prompts), length).clone()
            for row, (types, size) in enumerate(zip(self.types, self.prompts, strict=True)):
                found["token_types"][row, :size] = types[:size]
        return found


def _continued(positions: Tensor, length: int) -> Tensor:
    """Positions [3, T] of a prompt, continued by those of a text."""
    more = torch.arange(1, length - positions.shape[1] + 1)
    return torch.cat([positions, (positions.max() + more).expand(3, -1)], dim=1)


def _next_logits(
    model: LanguageModel, texts: list[list[int]], device: torch.device, seen: _Seen | None = None
) -> Tensor:
    """Logits [B, V] of the token after each text."""
    length = -(-max(map(len, texts)) // STEP) * STEP
    tokens = torch.zeros(len(texts), length, dtype=torch.int64)
    for row, text in enumerate(texts):
        tokens[row, : len(text)] = torch.tensor(text)
    sizes = torch.tensor([len(text) for text in texts])
    positions = torch.arange(length).expand(len(texts), -1)
    lengths = torch.stack([sizes, length - sizes], dim=1).to(torch.int32)
    # The positions of padding simply continue; nothing uses them.
    batch: dict[str, Any] = {"tokens": tokens, "positions": positions, "document_lengths": lengths}
    packing: dict[str, Any] = {"predicting": sizes[:0]}  # There is no loss.
    if seen is not None:
        batch |= seen.inputs(length)
        packing["images"] = seen.images
    on_device: dict[str, Any] = {name: tensor.to(device) for name, tensor in batch.items()}
    on_device["packing"] = packing
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
