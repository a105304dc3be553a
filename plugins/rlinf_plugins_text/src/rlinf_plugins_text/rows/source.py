"""Rows of tokens: each a text, a part of one, or a pack of several. Files are mapped on first use, in each process."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rlinf_core import UserError
from rlinf_core.data.sample import Row
from rlinf_plugins_text.rows.dataset import TextDatasetConfig
from rlinf_plugins_text.rows.packing import flatten, pack
from rlinf_plugins_text.rows.store import TokenStore, open_store

if TYPE_CHECKING:
    from rlinf_core.contract.datasets import Split
    from rlinf_plugins_text.config import TextPolicyConfig


@dataclass(frozen=True)
class TextSource:
    """The rows of a split; see `rlinf_core.SampleSource`."""

    store: TokenStore
    name: str
    """The dataset, for messages."""
    texts: NDArray[np.int64]
    """[S], the text of each piece; a text that is split has several pieces."""
    begins: NDArray[np.int64]
    """[S], the first token of each piece, counted over all texts."""
    lengths: NDArray[np.int64]
    """[S], tokens of each piece."""
    pieces: NDArray[np.int64]
    """[S], the pieces of the rows, one row after the other."""
    ends: NDArray[np.int64]
    """[N + 1], where each row begins and ends in `pieces`."""
    left_out: str
    """Which texts are in no row and why: too long to keep, or without a token to train; empty: none."""

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitems__(self, indices: Sequence[int]) -> list[Row]:
        """Rows with the keys of `describe.TextSample`."""
        return [self._row(index) for index in indices]

    without_images = __getitems__

    @property
    def episodes(self) -> NDArray[np.int64]:
        """[N], the first text of each row."""
        return self.texts[self.pieces[self.ends[:-1]]]

    def describe(self, index: int) -> str:
        """Where the first text of a row comes from."""
        more = int(self.ends[index + 1] - self.ends[index]) - 1
        return self.store.where(int(self.episodes[index])) + (f" and {more} more" if more else "")

    def fingerprint(self) -> str:
        """A hash of the tokens and of how they make rows."""
        digest = hashlib.blake2b(self.store.digest().encode(), digest_size=12)
        for array in (self.begins, self.lengths, self.pieces, self.ends):
            digest.update(array.tobytes())
        return digest.hexdigest()

    def _row(self, index: int) -> Row:
        pieces = self.pieces[self.ends[index] : self.ends[index + 1]]
        places = [slice(self.begins[one], self.begins[one] + self.lengths[one]) for one in pieces]
        trained = [np.array(self._arrays["trained"][place]) for place in places]
        for part in trained:
            part[0] = False  # The first of a later piece: its predecessor is not in it.
        text_ends = self._arrays["ends"]
        return {
            "index": index,
            "tokens": np.concatenate([self._arrays["tokens"][place] for place in places]),
            "trained": np.concatenate(trained),
            "document_lengths": self.lengths[pieces].astype(np.int32),
            "left_out": self.left_out,
            "full_lengths": text_ends[self.texts[pieces] + 1] - text_ends[self.texts[pieces]],
        }

    @functools.cached_property
    def _arrays(self) -> dict[str, NDArray[Any]]:
        return {name: self.store.array(name) for name in ("tokens", "trained", "ends")}

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_arrays"}  # Mapped anew elsewhere.


def open_text(dataset: TextDatasetConfig, policy: TextPolicyConfig, split: Split) -> TextSource:
    """Open the rows of a split.

    Raises:
        UserError: A row is wrong, the tokenizer does not fit, or no text holds anything to train.
    """
    store = open_store(dataset, policy.text_tokenizer())
    if not len(store.array("held_out")):
        raise UserError(f"data.repo_id: {dataset.repo_id} holds no text: it has no rows")
    given = _texts_of(dataset, store, split)
    if not len(given):
        raise UserError(f"the {split} split of {dataset.repo_id} holds no rows")
    begins, lengths, texts = _pieces(store, given, policy.max_length, policy.overlong)
    left_out = _left_out(dataset, policy, store, np.setdiff1d(given, texts))
    if not len(texts):
        raise UserError(
            f"the {split} split of {dataset.repo_id} holds nothing to train: {left_out} "
            "(data.format, data.loss_on and the chat template say which tokens are trained)"
        )
    groups = pack(lengths, policy.max_length) if policy.packing else np.split(np.arange(len(texts)), len(texts))
    pieces, ends = flatten(groups)
    return TextSource(store, dataset.repo_id, texts, begins, lengths, pieces, ends, left_out)


def _texts_of(dataset: TextDatasetConfig, store: TokenStore, split: Split) -> NDArray[np.int64]:
    """The texts of a split: which are held out depends on the dataset alone."""
    held_out = np.array(store.array("held_out"))
    count = len(held_out)
    if dataset.validation_episodes:
        if unknown := [one for one in dataset.validation_episodes if not 0 <= one < count]:
            raise UserError(f"data.validation_episodes names {unknown}, but the texts are 0 to {count - 1}")
        held_out[list(dataset.validation_episodes)] = True
    if dataset.validation_fraction:
        wanted = max(1, round(count * dataset.validation_fraction))
        if wanted >= count:
            raise UserError(f"data.validation_fraction = {dataset.validation_fraction} leaves none of {count} texts")
        held_out[np.random.Generator(np.random.Philox(key=count)).permutation(count)[:wanted]] = True
    return np.flatnonzero(held_out if split == "validation" else ~held_out)


def _left_out(dataset: TextDatasetConfig, policy: TextPolicyConfig, store: TokenStore, texts: NDArray[np.int64]) -> str:
    """Why texts are in no row, each reason with their number and where the first of them stands."""
    if not len(texts):
        return ""
    ends, trained = store.array("ends"), store.array("trained")
    # A text's first token has no predecessor, and does not count.
    silent = np.array([not trained[ends[text] + 1 : ends[text + 1]].any() for text in texts])
    nothing = "the assistant says nothing" if dataset.is_chat and dataset.loss_on == "completion" else "no words"
    longer = "longer than" if policy.overlong == "drop" else "with something to train only after the end of"
    reasons = {
        f"with nothing to train ({nothing})": silent,
        f"{longer} policy.max_length = {policy.max_length}": ~silent,
    }
    return "; ".join(
        f"{which.sum()} {'text' if which.sum() == 1 else 'texts'} {reason}, first: {store.where(int(texts[which][0]))}"
        for reason, which in reasons.items()
        if which.any()
    )


def _pieces(
    store: TokenStore, texts: NDArray[np.int64], max_length: int, overlong: str
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """First token, length and text of each piece; pieces in which nothing is trained are left out."""
    ends, trained = store.array("ends"), store.array("trained")
    first, full = np.asarray(ends[texts]), np.asarray(ends[texts + 1] - ends[texts])
    if overlong == "drop":
        first, texts, full = first[full <= max_length], texts[full <= max_length], full[full <= max_length]
    counts = -(-full // max_length) if overlong == "split" else np.ones_like(full)
    number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)  # Within its text.
    texts, first, full = np.repeat(texts, counts), np.repeat(first, counts), np.repeat(full, counts)
    begins = first + number * max_length
    lengths = np.minimum(full - number * max_length, max_length)
    so_far = np.concatenate([[0], np.cumsum(trained, dtype=np.int64)])
    # A piece's first token has no predecessor in it, and does not count.
    last = begins + lengths
    counted = so_far[last] - so_far[np.minimum(begins + 1, last)]
    return begins[counted > 0], lengths[counted > 0], texts[counted > 0]
