r"""Prompts to token ids, in the two formats of π0 and π0.5.

π0 reads `<bos>{task}\n`. π0.5 can also read the state as text, one integer of 0..255 a number:
`<bos>Task: {task}, State: {bins};\nAction: `. Neither ends with <eos>: what follows are actions.
Source: openpi, `models/tokenizer.py` (PaligemmaTokenizer).
"""

from __future__ import annotations

from collections.abc import Sequence
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
"""The tokenizer that is shipped: 512 entries, for models trained from scratch. `make_small_tokenizer.py` made it."""

GEMMA_ENTRIES = 256_000
"""Entries of Gemma's vocabulary, which PaliGemma's begins with."""
HUB_FILE = "tokenizer.model"
"""The sentencepiece model in PaliGemma's repositories on the hub."""

PAD, BOS = 0, 2
BEFORE_STATE, AFTER_STATE = ", State: ", ";\nAction: "
_BIN_EDGES = np.linspace(-1, 1, 257)[:-1]  # the left edge of each of 256 bins over [-1, 1]; exact, multiples of 1/128


@dataclass(frozen=True)
class PromptTokenizer:
    """Turns a prompt into ids of a fixed length.

    Holds the path of the sentencepiece model, not the model, so that it pickles into loader workers; each process loads
    the file once. Raises `UserError` when there is no such file.
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
            state: [D], normalised and not padded; given, it becomes part of the text (π0.5's discrete state).

        Returns:
            Ids [max_length], filled up with 0, and a mask [max_length], True where there is a token. What does not fit
            is cut off at the end.
        """
        return self.fill(self.encode(prompt, state))

    def encode(self, prompt: str, state: NDArray[np.floating] | None = None) -> tuple[int, ...]:
        """All ids of a prompt (and of a state [D] within it), however many there are."""
        return _encode_task(self.path, prompt) if state is None else _encode_task_and_state(self.path, prompt, state)

    def fill(self, ids: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Ids and mask at the fixed length, filled up or cut."""
        count = min(len(ids), self.max_length)
        tokens = np.full(self.max_length, PAD, dtype=np.int64)
        tokens[:count] = ids[:count]
        return tokens, np.arange(self.max_length) < count


def clean(prompt: str) -> str:
    """The prompt on one line, underscores as spaces, without space around it (there may be some under underscores)."""
    return prompt.strip().replace("_", " ").replace("\n", " ")


def discretise(state: NDArray[np.floating]) -> NDArray[np.int64]:
    """Bin numbers [D] of a normalised state: 0..255 over [-1, 1]; -1 below, 255 above. A bin holds its left edge."""
    return np.digitize(state, _BIN_EDGES).astype(np.int64) - 1


def find_tokenizer(text: str) -> str:
    """The local path of the sentencepiece model that `policy.tokenizer` names.

    Args:
        text: A file, a folder with `tokenizer.model`, or a model on the hub, `owner/name` with an optional `@revision`,
            whose `tokenizer.model` is downloaded unless the cache has it. Empty: the small one that is shipped.

    Raises:
        UserError: It cannot be had.
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
    """The sentencepiece model of a file, loaded once a process. Raises `UserError` if it cannot be read."""
    try:
        return sentencepiece.SentencePieceProcessor(model_file=path)
    except (OSError, RuntimeError) as error:
        raise UserError(f"cannot read {path!r} as a sentencepiece model, see policy.tokenizer: {error}") from error


@lru_cache(maxsize=4096)
def _encode_task(path: str, prompt: str) -> tuple[int, ...]:
    """Ids of π0's format. Cached: a dataset has few tasks. The newline is encoded on its own, as the reference does."""
    processor = load_processor(path)
    return (BOS, *processor.encode(clean(prompt)), *processor.encode("\n"))


def _encode_task_and_state(path: str, prompt: str, state: NDArray[np.floating]) -> tuple[int, ...]:
    """Ids of π0.5's format. Not cached: no two states are alike."""
    bins = " ".join(str(number) for number in discretise(state))
    return (BOS, *load_processor(path).encode(f"Task: {clean(prompt)}{BEFORE_STATE}{bins}{AFTER_STATE}"))
