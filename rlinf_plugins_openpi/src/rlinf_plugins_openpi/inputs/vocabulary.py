"""Which tokens the prompts of a run can have: the rows of the embedding that it trains (`policy.train_embedding`)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import numpy as np

from rlinf_plugins_openpi.inputs.tokenizer import AFTER_STATE, BEFORE_STATE, BOS, PAD, PromptTokenizer, load_processor

_HEADS = "|".join(re.escape(BEFORE_STATE[start:]) for start in range(len(BEFORE_STATE)))
_TAILS = "|".join(re.escape(AFTER_STATE[:stop]) for stop in range(len(AFTER_STATE), 0, -1))
_AT_STATE = re.compile(rf"(?!.*(?:--|  ))(?:{_HEADS})?[-0-9 ]*(?:{_TAILS})?", re.DOTALL)
EVERY_BIN = np.arange(-129, 128) / 128.0
"""[257], a state with a number in each bin, and one below them all."""


def possible_tokens(tokenizer: PromptTokenizer, prompts: Iterable[str], *, with_state: bool) -> list[int]:
    """The ids, ascending, that these prompts can become, and those of padding and of the prompt's frame.

    Args:
        tokenizer: Turns prompts into ids; how long they may be does not count.
        prompts: All tasks.
        with_state: The state stands in the prompt (π0.5's discrete state): any state counts, not the data's alone.
    """
    tokens = {PAD, BOS}
    for prompt in prompts:
        tokens.update(tokenizer.encode(prompt, EVERY_BIN if with_state else None))
    if with_state:
        tokens.update(_entries_at_state(tokenizer.path))
    return sorted(tokens)


def _entries_at_state(path: str) -> Iterator[int]:
    """The vocabulary's entries that can stand in a state's numbers, or where these meet the text around them."""
    processor = load_processor(path)
    for token in range(processor.vocab_size()):
        text = processor.id_to_piece(token).replace("▁", " ")
        if text and _AT_STATE.fullmatch(text):
            yield token
