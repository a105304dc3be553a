r"""Prompts to token ids, in the two formats of π0 and π0.5.

π0 reads `<bos>{task}\n`. π0.5 can also read the state as text, an integer from 0 to 255 for each number:
`<bos>Task: {task}, State: {bins};\nAction: `. Neither ends with <eos>, because actions follow.
Source: openpi, `models/tokenizer.py` (PaligemmaTokenizer).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from pathlib import Path

import numpy as np
import sentencepiece
from numpy.typing import NDArray

from rlinf_core import UserError
from rlinf_core.hub import (
    NotInRepositoryError,
    cached_file,
    download_file,
    full_name,
    local_path,
    parse_hub_id,
)

SMALL_MODEL = str(files("rlinf_plugins_openpi") / "assets" / "small_tokenizer.model")
"""The built-in tokenizer: 512 entries, for models trained from scratch. Made by `make_small_tokenizer.py`."""

GEMMA_ENTRIES = 256_000
"""Entries of Gemma's vocabulary, with which PaliGemma's begins."""
HUB_FILE = "tokenizer.model"
"""The sentencepiece model in PaliGemma's repositories on the hub."""

PAD, BOS = 0, 2
BEFORE_STATE, AFTER_STATE = ", State: ", ";\nAction: "
EVERY_BIN = np.arange(-129, 128) / 128.0
"""[257], a state with one number in each bin, and one below all bins."""
_BIN_EDGES = np.linspace(-1, 1, 257)[:-1]  # the left edge of each of 256 bins over [-1, 1]; exact, multiples of 1/128


@dataclass(frozen=True)
class PromptTokenizer:
    """Turns a prompt into ids of a fixed length.

    Holds the path of the sentencepiece model, not the model, so that it can be pickled for loader workers; each process
    loads the file once. Raises `UserError` if there is no such file.
    """

    path: str
    max_length: int

    def __post_init__(self) -> None:
        if not Path(self.path).is_file():
            raise UserError(
                f"there is no tokenizer model at {self.path!r}: set policy.tokenizer to a sentencepiece model "
                "(PaliGemma's for published weights, by its path or as google/paligemma-3b-pt-224)"
            )

    def __call__(
        self, prompt: str, state: NDArray[np.floating] | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Tokenise a prompt.

        Args:
            prompt: The task in words.
            state: [D], normalised and not padded; if given, it becomes part of the text (π0.5's discrete state).

        Returns:
            Ids [max_length], padded with 0, and a mask [max_length], True where there is a token. Tokens beyond
            `max_length` are cut.
        """
        return self.fill(self.encode(prompt, state))

    def encode(self, prompt: str, state: NDArray[np.floating] | None = None) -> tuple[int, ...]:
        """All ids of a prompt (and of a state [D] within it), without padding or cutting."""
        return _encode_task(self.path, prompt) if state is None else _encode_task_and_state(self.path, prompt, state)

    def fill(self, ids: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Ids and mask at the fixed length, padded or cut."""
        count = min(len(ids), self.max_length)
        tokens = np.full(self.max_length, PAD, dtype=np.int64)
        tokens[:count] = ids[:count]
        return tokens, np.arange(self.max_length) < count


def clean(prompt: str) -> str:
    """Put the prompt on one line, strip it, then replace underscores by spaces (so outer underscores leave spaces)."""
    return prompt.strip().replace("_", " ").replace("\n", " ")


def discretise(state: NDArray[np.floating]) -> NDArray[np.int64]:
    """Bin numbers [D] of a normalised state: 0..255 over [-1, 1], -1 below, 255 above. A bin includes its left edge."""
    return np.digitize(state, _BIN_EDGES).astype(np.int64) - 1


def find_tokenizer(text: str) -> str:
    """The local path of the sentencepiece model that `policy.tokenizer` names.

    Args:
        text: A file, a folder with `tokenizer.model`, or a model on the hub, `owner/name` with an optional `@revision`,
            whose `tokenizer.model` is downloaded unless it is cached. Empty: the built-in one.

    Raises:
        UserError: There is no such file or model, or the download fails.
    """
    if not text:
        return SMALL_MODEL
    if text.endswith(".model"):
        return str(Path(text).expanduser())
    path = local_path(text, "policy.tokenizer")
    if path is not None:
        return str(path / HUB_FILE if path.is_dir() else path)
    model, revision = parse_hub_id(text)
    try:
        found = cached_file(model, HUB_FILE, revision)
        return str(found or download_file(model, HUB_FILE, revision, "policy.tokenizer"))
    except NotInRepositoryError as error:
        raise UserError(
            f"policy.tokenizer: the model {full_name(model, revision)} on the hub holds no {HUB_FILE}; "
            "google/paligemma-3b-pt-224 does"
        ) from error


@lru_cache(maxsize=8)
def load_processor(path: str) -> sentencepiece.SentencePieceProcessor:
    """The sentencepiece model in a file, loaded once per process. Raises `UserError` if it cannot be read."""
    try:
        return sentencepiece.SentencePieceProcessor(model_file=path)
    except (OSError, RuntimeError) as error:
        raise UserError(f"cannot read {path!r} as a sentencepiece model, see policy.tokenizer: {error}") from error


@lru_cache(maxsize=4096)
def _encode_task(path: str, prompt: str) -> tuple[int, ...]:
    """Ids in π0's format. Cached: a dataset has few tasks. The newline is encoded separately, as in the reference."""
    processor = load_processor(path)
    return (BOS, *processor.encode(clean(prompt)), *processor.encode("\n"))


def _encode_task_and_state(path: str, prompt: str, state: NDArray[np.floating]) -> tuple[int, ...]:
    """Ids in π0.5's format. Not cached, because hardly any state occurs twice."""
    bins = " ".join(str(number) for number in discretise(state))
    return (BOS, *load_processor(path).encode(f"Task: {clean(prompt)}{BEFORE_STATE}{bins}{AFTER_STATE}"))


def possible_tokens(tokenizer: PromptTokenizer, prompts: Iterable[str], *, with_state: bool) -> list[int]:
    """All ids, ascending, that can occur in these prompts, including padding and the fixed parts of the format.

    Args:
        tokenizer: Turns prompts into ids; its maximum length is ignored.
        prompts: All tasks.
        with_state: The prompt contains the state (π0.5's discrete state): any state counts, not only those in the data.
    """
    tokens = {PAD, BOS}
    for prompt in prompts:
        tokens.update(tokenizer.encode(prompt, EVERY_BIN if with_state else None))
    if with_state:
        tokens.update(_entries_at_state(tokenizer.path))
    return sorted(tokens)


_HEADS = "|".join(re.escape(BEFORE_STATE[start:]) for start in range(len(BEFORE_STATE)))
_TAILS = "|".join(re.escape(AFTER_STATE[:stop]) for stop in range(len(AFTER_STATE), 0, -1))
_AT_STATE = re.compile(rf"(?!.*(?:--|  ))(?:{_HEADS})?[-0-9 ]*(?:{_TAILS})?", re.DOTALL)


def _entries_at_state(path: str) -> Iterator[int]:
    """Entries of the vocabulary that can occur in the numbers of a state, or where these meet the text around them."""
    processor = load_processor(path)
    for token in range(processor.vocab_size()):
        text = processor.id_to_piece(token).replace("▁", " ")
        if text and _AT_STATE.fullmatch(text):
            yield token
