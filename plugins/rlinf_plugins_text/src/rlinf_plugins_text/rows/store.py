"""All texts of a dataset as tokens on disk, written once per machine; ranks and loader workers map the same files.

They are an entry of the cache (`rlinf_core.cache`), whose key is a hash of the data, the tokenizer and the settings
that decide what is trained. A token takes five bytes: four for its id, one for whether it is trained.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlinf_core import UserError
from rlinf_core.cache import CacheEntry, cache_folder, cache_key, find_entry, store_entry
from rlinf_plugins_text.rows.dataset import TextDatasetConfig
from rlinf_plugins_text.rows.files import TextRow, content_tag, read_rows
from rlinf_plugins_text.rows.formats import Example, to_example
from rlinf_plugins_text.rows.seen_images import SeenImages
from rlinf_plugins_text.rows.tokenizer import TextTokenizer
from rlinf_plugins_text.rows.tokens import Tokens, control_pieces, tokenize
from rlinf_plugins_text.vision.processor import Vision
from rlinf_plugins_text.vision.store import ImageStore

VERSION = 4
"""Version of tokenization; part of the key."""
IMAGES_VERSION = 1
"""The same of texts with images."""
KIND = "text"
"""The folder in the cache."""
AT_ONCE = 1000
"""Texts tokenized in one call, which uses all cores."""


@dataclass(frozen=True)
class Notes:
    """What was noticed in the texts: kind -> what -> how often, and where first."""

    found: dict[str, dict[str, list[Any]]] = field(default_factory=dict)

    def add(self, kind: str, what: str, place: str) -> None:
        """Count one more; `place` is where the text comes from."""
        entry = self.found.setdefault(kind, {}).setdefault(what, [0, place])
        entry[0] += 1

    def of(self, kind: str) -> Mapping[str, tuple[int, str]]:
        """What was found of a kind -> how often, and where first."""
        return {what: (count, place) for what, (count, place) in self.found.get(kind, {}).items()}


@dataclass(frozen=True)
class TokenStore:
    """The concatenated tokens of a dataset's texts, in files."""

    entry: CacheEntry

    def array(self, name: str) -> NDArray[Any]:
        """One of the arrays, memory-mapped, for N tokens in E texts.

        `tokens` int32 [N]; `trained` bool [N]; `ends` int64 [E + 1], text e is `tokens[ends[e] : ends[e + 1]]`;
        `held_out` bool [E], whether a text comes from the files or the split set aside for validation.

        Raises:
            UserError: Somebody has removed the file since the run started.
        """
        path = self.entry.file(f"{name}.npy")
        try:
            mapped: NDArray[Any] = np.load(path, mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:
            raise _removed(path, error) from error
        return mapped

    @property
    def images(self) -> ImageStore | None:
        """The images of the texts; None: there are none."""
        return ImageStore(self.entry) if self.entry.facts.get("images") else None

    def digest(self) -> str:
        """A hash of the tokens and of which are trained and held out; it does not depend on the folder's path."""
        return str(self.entry.facts["digest"])

    def notes(self) -> Notes:
        """What was noticed while the texts were tokenized."""
        return Notes(self.entry.facts["notes"])

    def where(self, text: int) -> str:
        """Where a text comes from, for messages."""
        path = self.entry.file("where.txt")
        try:
            return path.read_text(encoding="utf-8").split("\n")[text]
        except OSError as error:
            raise _removed(path, error) from error


def _removed(path: Path, error: Exception) -> UserError:
    return UserError(
        f"{path}, which holds tokens in the cache, was removed or damaged while the run was using it ({error}): start "
        "again, which writes it again"
    )


def open_store(config: TextDatasetConfig, tokenizer: TextTokenizer, vision: Vision | None = None) -> TokenStore:
    """The tokens of a dataset, written first if they are not on disk yet.

    Args:
        config: The `[data]` table.
        tokenizer: The policy's.
        vision: What a model that sees images needs; None: it reads only text.

    Raises:
        UserError: A row cannot be read (names its file and line), or the tokens cannot be written.
    """
    said = config.model_dump(include={"format", "keys", "roles", "as_chat", "loss_on", "repo_id", "subset", "split"})
    parts = [VERSION, said, config.validation_split, content_tag(config), _tokenizer_tag(tokenizer)]
    if vision is not None:
        parts += [IMAGES_VERSION, config.image_folder, vision.tag()]
    key = cache_key(json.dumps(parts, sort_keys=True))
    if (entry := find_entry(KIND, key)) is not None:
        return TokenStore(entry)
    try:
        return TokenStore(store_entry(KIND, key, lambda folder: _write(config, tokenizer, vision, folder)))
    except OSError as error:
        raise UserError(
            f"the tokens of {config.repo_id} cannot be written to {cache_folder() / KIND}: {error}. Set RLINF_CACHE to "
            "a folder with free space"
        ) from error


def _tokenizer_tag(tokenizer: TextTokenizer) -> str:
    file = (tokenizer.folder / "tokenizer.json").read_bytes()
    rest = json.dumps(tokenizer.chat_tag).encode()
    return hashlib.blake2b(file + rest, digest_size=12).hexdigest()


def _write(config: TextDatasetConfig, tokenizer: TextTokenizer, vision: Vision | None, folder: Path) -> dict[str, Any]:
    """Write the files of `TokenStore`, and those of its images; returns its digest and notes."""
    lengths: list[int] = []
    held_out: list[bool] = []
    sum_of_lengths = 0
    notes = Notes()
    digest = hashlib.blake2b(digest_size=12)
    seen = None if vision is None else SeenImages(config, vision, folder)
    with (
        (folder / "tokens").open("wb") as tokens,
        (folder / "trained").open("wb") as trained,
        (folder / "where.txt").open("w", encoding="utf-8") as where,
    ):
        for part in (False, True) if config.validation_files or config.validation_split else (False,):
            for places, examples in _batches(read_rows(config, held_out=part), config, tokenizer, seen):
                for place, example, one in zip(places, examples, tokenize(examples, tokenizer), strict=True):
                    if seen is not None:
                        seen.place(example, one, sum_of_lengths)
                        sum_of_lengths += len(one.ids)
                    tokens.write(one.ids.tobytes())
                    trained.write(one.trained.tobytes())
                    digest.update(one.ids.tobytes() + one.trained.tobytes())
                    lengths.append(len(one.ids))
                    _note(notes, place, example, one, tokenizer)
                held_out += [part] * len(places)
                where.write("".join(f"{place}\n" for place in places))
    for name, kind in (("tokens", np.int32), ("trained", np.bool_)):
        raw = folder / name
        size = raw.stat().st_size // np.dtype(kind).itemsize
        np.save(folder / f"{name}.npy", np.memmap(raw, kind, "r", shape=(size,)) if size else np.zeros(0, kind))
        raw.unlink()
    np.save(folder / "held_out.npy", np.array(held_out, np.bool_))
    digest.update(np.array(held_out, np.bool_).tobytes())
    np.save(folder / "ends.npy", np.cumsum([0, *lengths], dtype=np.int64))
    if seen is not None:
        digest.update(seen.save())
    images = 0 if seen is None else seen.count
    return {"digest": digest.hexdigest(), "notes": notes.found} | ({"images": images} if images else {})


def _note(notes: Notes, place: str, example: Example, tokens: Tokens, tokenizer: TextTokenizer) -> None:
    for what in example.unused:
        notes.add("unused", what, place)
    for end in tokens.ends:
        notes.add("ends", "" if end is None else tokenizer.decode([end]), place)
    for kind, names in (("given", tokens.given), ("doubled", tokens.doubled)):
        for name in names:
            notes.add(kind, name, place)
    if example.turns and not notes.of("chats"):
        for name, pieces in control_pieces(example.text, tokenizer).items():
            notes.add("pieces", f"{name!r} is {pieces} tokens instead of one", place)
    if example.turns:
        notes.add("chats", "", place)
        if (start := tokenizer.start) and tuple(tokens.ids[: len(start)].tolist()) != start:
            notes.add("no start", tokenizer.decode(start), place)


def _batches(
    rows: Iterable[TextRow], config: TextDatasetConfig, tokenizer: TextTokenizer, seen: SeenImages | None
) -> Iterator[tuple[list[str], list[Example]]]:
    rows = iter(rows)
    while some := list(islice(rows, AT_ONCE if seen is None else AT_ONCE // 10)):
        examples = []
        for place, row in some:
            try:
                images = None if seen is None else seen.of_row(row)
                prefix = None if seen is None else seen.prefix(tokenizer)
                examples.append(to_example(row, config, lambda: tokenizer.chat, images, prefix=prefix))
                examples[-1].check_unicode()
                if seen is not None:
                    seen.add(examples[-1])
            except UserError as error:
                raise UserError(f"{place}: {error}") from error
        places = [place for place, _ in some]
        yield places, examples if seen is None else seen.expand(places, examples)
