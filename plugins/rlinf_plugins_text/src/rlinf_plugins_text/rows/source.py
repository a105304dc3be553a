"""Rows of tokens: a text, a piece of one, or a pack of several.

The token files are memory-mapped on first use, in each process.
"""

from __future__ import annotations

import functools
import hashlib
import os
from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rlinf_core import UserError
from rlinf_core.data.sample import Row
from rlinf_plugins_text.rows.dataset import TextDatasetConfig
from rlinf_plugins_text.rows.files import all_files
from rlinf_plugins_text.rows.store import Notes, TokenStore, open_store
from rlinf_plugins_text.rows.tokenizer import TextTokenizer
from rlinf_plugins_text.vision.processor import Vision
from rlinf_plugins_text.vision.store import ImageStore

if TYPE_CHECKING:
    from rlinf_core.contract.datasets import Split


class Stops(NamedTuple):
    """Where an exported policy stops, as text."""

    tokens: tuple[str, ...]
    """The tokens that it stops at."""
    inner: tuple[str, ...] = ()
    """Tokens that end turns of the chat template, but are also inside turns."""


@dataclass(frozen=True)
class TextSource:
    """The rows of a split; see `rlinf_core.SampleSource`."""

    store: TokenStore
    name: str
    """Name of the dataset, for messages."""
    texts: NDArray[np.int64]
    """[S], index of the text of each piece; a text that is split has several pieces."""
    begins: NDArray[np.int64]
    """[S], index of the first token of each piece, counted over all texts."""
    lengths: NDArray[np.int64]
    """[S], tokens of each piece."""
    pieces: NDArray[np.int64]
    """[S], indices of the pieces, ordered by row."""
    ends: NDArray[np.int64]
    """[N + 1], row n is `pieces[ends[n] : ends[n + 1]]`."""
    stops: Stops
    """The tokens that an exported policy stops at."""
    date: str
    """The date that the chat template writes; empty: it writes none."""
    left_out: str
    """How many texts are in no row, their share, and why: too long, or without a trained token; empty: none are."""
    files: tuple[Path, ...] = ()
    """The local files that the texts come from, for messages."""
    images: ImageStore | None = None
    """The images of the texts; None: there are none."""

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitems__(self, indices: Sequence[int]) -> list[Row]:
        """Rows with the keys of `samples.TextSample`. Raises `UserError` if an image cannot be read."""
        return [self._row(index) | self._images_of(index) for index in indices]

    def without_images(self, indices: Sequence[int]) -> list[Row]:
        """The same rows; no image is read."""
        return [self._row(index) for index in indices]

    @property
    def images_differ(self) -> bool:
        """Whether the images of a row belong to it alone, in number and size."""
        return self.images is not None

    @property
    def episodes(self) -> NDArray[np.int64]:
        """[N], index of the first text of each row."""
        return self.texts[self.pieces[self.ends[:-1]]]

    def describe(self, index: int) -> str:
        """Where the first text of a row comes from."""
        more = int(self.ends[index + 1] - self.ends[index]) - 1
        return self.store.where(int(self.episodes[index])) + (f" and {more} more" if more else "")

    def facts(self) -> Mapping[str, str]:
        """How turns end, what of the data is not used, and the date in the texts."""
        notes = self.store.notes()
        facts = {
            "turns end in": ", ".join(f"{end} ({count})" for end, (count, _) in notes.of("ends").items() if end),
            "not used": "; ".join(
                f"{what} ({_texts(count)}, first: {place})" for what, (count, place) in notes.of("unused").items()
            ),
            "already there": "; ".join(
                f"{token!r} in {_texts(count)}, not added again" for token, (count, _) in notes.of("given").items()
            ),
            "date": f"the chat template writes {self.date}, the same as long as the run lasts (policy.template_date)"
            if self.date
            else "",
        }
        return {name: fact for name, fact in facts.items() if fact}

    def warnings(self) -> Sequence[str]:
        """What of the tokens makes a model that does not stop, or that reads other tokens than it was trained on."""
        return list(_warnings(self.store.notes(), self.stops))

    def fingerprint(self) -> str:
        """A hash of the tokens and of how they form rows."""
        digest = hashlib.blake2b(self.store.digest().encode(), digest_size=12)
        for array in (self.begins, self.lengths, self.pieces, self.ends):
            digest.update(array.tobytes())
        return digest.hexdigest()

    def row_files(self) -> dict[str, Path]:
        """The local files that the texts come from, by name; empty for a dataset on the hub."""
        folder = os.path.commonpath([path.absolute().parent for path in self.files]) if self.files else ""
        return {path.absolute().relative_to(folder).as_posix(): path for path in self.files}

    def image_files_by_name(self) -> dict[str, Path]:
        """The files of all images; those that the data hold themselves are part of the fingerprint."""
        if self.images is None:
            return {}
        files = self.images.files()
        folder = os.path.commonpath([path.parent for path in files.values()]) if files else ""
        return {Path(name).relative_to(folder).as_posix(): path for name, path in files.items()}

    def _row(self, index: int) -> Row:
        pieces = self.pieces[self.ends[index] : self.ends[index + 1]]
        places = [slice(self.begins[one], self.begins[one] + self.lengths[one]) for one in pieces]
        trained = [np.array(self._arrays["trained"][place]) for place in places]
        for part in trained:
            part[0] = False  # Nothing predicts the first token of a piece.
        text_ends = self._arrays["ends"]
        images = {} if self.images is None else {"image_documents": self._image_documents(pieces)}
        return {
            "index": index,
            "tokens": np.concatenate([self._arrays["tokens"][place] for place in places]),
            "trained": np.concatenate(trained),
            "document_lengths": self.lengths[pieces].astype(np.int32),
            "left_out": self.left_out,
            "full_lengths": text_ends[self.texts[pieces] + 1] - text_ends[self.texts[pieces]],
            **images,
        }

    def _uses(self, piece: int) -> NDArray[np.int64]:
        assert self.images is not None
        begin = int(self.begins[piece])
        return self.images.uses(begin, begin + int(self.lengths[piece]))

    def _image_documents(self, pieces: NDArray[np.int64]) -> NDArray[np.int32]:
        counts = [len(self._uses(int(piece))) for piece in pieces]
        return np.repeat(np.arange(len(pieces), dtype=np.int32), counts)

    def _images_of(self, index: int) -> Row:
        """The decoded images of a row, in the order of its tokens."""
        if self.images is None:
            return {}
        pieces = self.pieces[self.ends[index] : self.ends[index + 1]].tolist()
        numbers = [number for piece in pieces for number in self._uses(piece)[:, 0].tolist()]
        return {"images": {f"image {place}": self.images.pixels(number) for place, number in enumerate(numbers, 1)}}

    @functools.cached_property
    def _arrays(self) -> dict[str, NDArray[Any]]:
        return {name: self.store.array(name) for name in ("tokens", "trained", "ends")}

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_arrays"}  # Each process maps its own.


def open_text(
    dataset: TextDatasetConfig,
    tokenizer: TextTokenizer,
    split: Split,
    *,
    max_length: int,
    overlong: str,
    packing: bool,
    stops: Stops,
    vision: Vision | None = None,
) -> TextSource:
    """Open the rows of a split.

    Args:
        dataset: The `[data]` table.
        tokenizer: The policy's.
        split: Which split.
        max_length: Maximum number of tokens in a row.
        overlong: What to do with longer texts: `"cut"`, `"split"` or `"drop"`.
        packing: Whether a row may hold several texts.
        stops: The tokens that an exported policy stops at.
        vision: What a model that sees images needs; None: it reads only text.

    Raises:
        UserError: A row is invalid, the tokenizer lacks something, or no token would be trained.
    """
    store = open_store(dataset, tokenizer, vision)
    if not len(store.array("held_out")):
        raise UserError(f"data.repo_id: {dataset.repo_id} is empty: it has no rows")
    given = _texts_of(dataset, store, split)
    if not len(given):
        raise UserError(f"the {split} split of {dataset.repo_id} has no rows")
    begins, lengths, texts = _pieces(store, given, max_length, overlong)
    left_out = _left_out(dataset, store, np.setdiff1d(given, texts), max_length, overlong)
    if not len(texts):
        raise UserError(f"the {split} split of {dataset.repo_id} has no token to train: {left_out}{_way_out(dataset)}")
    if left_out:
        left_out = f"{1 - len(np.unique(texts)) / len(given):.0%} of {len(given)} texts are left out: {left_out}"
    groups = pack(lengths, max_length) if packing else np.split(np.arange(len(texts)), len(texts))
    ends = np.cumsum([0, *(len(group) for group in groups)], dtype=np.int64)
    pieces = np.concatenate(groups)
    return TextSource(
        store=store,
        name=dataset.repo_id,
        texts=texts,
        begins=begins,
        lengths=lengths,
        pieces=pieces,
        ends=ends,
        stops=stops,
        date=tokenizer.date if store.notes().of("chats") else "",
        left_out=left_out,
        files=tuple(all_files(dataset)),
        images=store.images,
    )


def _warnings(notes: Notes, stops: Stops) -> Iterator[str]:
    turns = sum(count for count, _ in notes.of("ends").values())
    for end, (count, place) in notes.of("ends").items():
        if not end:
            yield (
                f"{count} of {turns} turns end in no control token, so that the model does not learn to stop there "
                f"(first: {place}): set policy.chat_template to a template that ends turns with a token of the "
                'tokenizer, such as "chatml"'
            )
        elif end in stops.inner and end not in stops.tokens:
            yield (
                f"{count} of {turns} turns end in {end!r} (first: {place}), which the chat template also writes inside "
                "turns, so that an exported policy does not stop at it: these turns do not teach the model to stop. A "
                "message with weight = 0 is left out of the loss"
            )
        elif end not in stops.tokens:
            yield (
                f"{count} of {turns} turns end in {end!r} (first: {place}), but an exported policy stops at "
                f"{', '.join(map(repr, stops.tokens)) or 'no token'}: add {end!r} to policy.stop_tokens"
            )
    if pieces := notes.of("pieces"):
        yield (
            f"the chat template writes control tokens that the tokenizer does not have: {', '.join(pieces)} (first: "
            f"{next(iter(pieces.values()))[1]}). Set policy.chat_template to a template with the tokenizer's own, or "
            "policy.tokenizer to one that has them"
        )
    for token, (count, place) in notes.of("no start").items():
        yield (
            f"{_texts(count)} without {token!r} at the beginning (first: {place}), which the tokenizer puts before "
            "every other text, and which the model expects there: set policy.chat_template to a template that writes "
            "bos_token"
        )
    for token, (count, place) in notes.of("doubled").items():
        yield (
            f"{token!r} is twice in a row in {_texts(count)} (first: {place}): the data contain what the chat template "
            "or the tokenizer writes; remove it from the data, or change policy.chat_template"
        )


def _texts(count: int) -> str:
    return f"{count} {'text' if count == 1 else 'texts'}"


def _way_out(dataset: TextDatasetConfig) -> str:
    """What to set if no text has a trained token."""
    if not dataset.is_chat or dataset.loss_on == "all":
        return ""
    if dataset.as_chat:
        return '; data.loss_on = "all" trains prompts, too'
    return (
        '; data.roles = { speaker = "assistant" } is for data that call the assistant otherwise, and '
        'data.loss_on = "all" trains what everybody says'
    )


def _texts_of(dataset: TextDatasetConfig, store: TokenStore, split: Split) -> NDArray[np.int64]:
    """Indices of the texts of a split; which ones are held out depends on the dataset alone."""
    held_out = np.array(store.array("held_out"))
    count = len(held_out)
    if dataset.validation_episodes:
        if unknown := [one for one in dataset.validation_episodes if not 0 <= one < count]:
            raise UserError(f"data.validation_episodes lists {unknown}, but the texts are numbered 0 to {count - 1}")
        held_out[list(dataset.validation_episodes)] = True
    if dataset.validation_fraction:
        wanted = max(1, round(count * dataset.validation_fraction))
        if wanted >= count:
            raise UserError(
                f"data.validation_fraction = {dataset.validation_fraction} leaves none of {count} texts for training"
            )
        held_out[np.random.Generator(np.random.Philox(key=count)).permutation(count)[:wanted]] = True
    return np.flatnonzero(held_out if split == "validation" else ~held_out)


def _left_out(
    dataset: TextDatasetConfig, store: TokenStore, texts: NDArray[np.int64], max_length: int, overlong: str
) -> str:
    """Why these texts are in no row: for each reason their number and where the first one comes from."""
    if not len(texts):
        return ""
    ends, trained = store.array("ends"), store.array("trained")
    # The first token of a text does not count: nothing predicts it.
    silent = np.array([not trained[ends[text] + 1 : ends[text + 1]].any() for text in texts])
    nothing = "the assistant says nothing" if dataset.is_chat and dataset.loss_on == "completion" else "they are empty"
    longer = "longer than" if overlong == "drop" else "with trained tokens only beyond"
    reasons = {
        f"without a trained token ({nothing})": silent,
        f"{longer} policy.max_length = {max_length}": ~silent,
    }
    return "; ".join(
        f"{which.sum()} {'text' if which.sum() == 1 else 'texts'} {reason}, first: {store.where(int(texts[which][0]))}"
        for reason, which in reasons.items()
        if which.any()
    )


def _pieces(
    store: TokenStore, texts: NDArray[np.int64], max_length: int, overlong: str
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """First token, length and text of each piece that has a trained token."""
    ends, trained = store.array("ends"), store.array("trained")
    first, full = np.asarray(ends[texts]), np.asarray(ends[texts + 1] - ends[texts])
    if overlong == "drop":
        first, texts, full = first[full <= max_length], texts[full <= max_length], full[full <= max_length]
    spans = store.images.spans if store.images is not None else np.zeros((0, 2), np.int64)
    if overlong == "split" and len(spans):
        begins, lengths, texts = _split_around(first, full, texts, spans, max_length)
        return _with_trained(begins, lengths, texts, trained)
    counts = -(-full // max_length) if overlong == "split" else np.ones_like(full)
    number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)  # Within its text.
    texts, first, full = np.repeat(texts, counts), np.repeat(first, counts), np.repeat(full, counts)
    begins = first + number * max_length
    lengths = np.minimum(full - number * max_length, max_length)
    if len(spans):
        lengths = _ends_before(begins + lengths, spans) - begins
    return _with_trained(begins, lengths, texts, trained)


def _ends_before(ends: NDArray[np.int64], spans: NDArray[np.int64]) -> NDArray[np.int64]:
    """The ends of pieces, moved before an image that they would cut: an image is seen whole or not at all."""
    place = np.searchsorted(spans[:, 0], ends) - 1  # The last image that begins before the end.
    begin, end = spans[np.maximum(place, 0)].T
    return np.where((place >= 0) & (begin < ends) & (ends < end), begin, ends)


def _split_around(
    first: NDArray[np.int64],
    full: NDArray[np.int64],
    texts: NDArray[np.int64],
    spans: NDArray[np.int64],
    max_length: int,
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Pieces of texts that end before an image which does not fit; one that fits in no piece is left out."""
    pieces: list[tuple[int, int, int]] = []
    for begin, length, text in zip(first.tolist(), full.tolist(), texts.tolist(), strict=True):
        stop = begin + length
        while begin < stop:
            end = int(_ends_before(np.array([min(begin + max_length, stop)]), spans)[0])
            if end > begin:
                pieces.append((begin, end - begin, text))
                begin = end
            else:
                begin = int(spans[np.searchsorted(spans[:, 0], begin), 1])
    begins, lengths, numbers = np.array(pieces, np.int64).reshape(-1, 3).T
    return begins, lengths, numbers


def _with_trained(
    begins: NDArray[np.int64], lengths: NDArray[np.int64], texts: NDArray[np.int64], trained: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """The pieces that have a trained token."""
    so_far = np.concatenate([[0], np.cumsum(trained, dtype=np.int64)])
    # The first token of a piece does not count: nothing predicts it.
    last = begins + lengths
    counted = so_far[last] - so_far[np.minimum(begins + 1, last)]
    return begins[counted > 0], lengths[counted > 0], texts[counted > 0]


def pack(lengths: NDArray[np.int64], capacity: int) -> list[NDArray[np.int64]]:
    """Choose which texts share a sequence: best fit, longest first, so that little stays empty.

    Args:
        lengths: [N], tokens in each text, at most `capacity`.
        capacity: Tokens in a pack.

    Returns:
        The indices of each pack's texts, ascending; every text is in exactly one pack.
    """
    room: list[tuple[int, int]] = []  # (tokens left, pack), sorted.
    packs: list[list[int]] = []
    for text in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[text])
        place = bisect_left(room, (length, -1))
        if place == len(room):
            packs.append([])
            left, number = capacity, len(packs) - 1
        else:
            left, number = room.pop(place)
        packs[number].append(text)
        if left > length:
            insort(room, (left - length, number))
    return [np.array(sorted(texts), np.int64) for texts in packs]
