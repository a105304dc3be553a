"""All texts of a dataset as tokens, made once a machine and kept on disk: ranks and loader workers map the same files.

They lie in the folder `RLINF_CACHE` (default `~/.cache/rlinf_core`), four bytes a token and one that says whether it is
trained, under a name that changes with the data, the tokenizer and the settings that say what is trained.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlinf_core import UserError
from rlinf_plugins_text.rows.dataset import TextDatasetConfig
from rlinf_plugins_text.rows.files import TextRow, content_tag, read_rows
from rlinf_plugins_text.rows.formats import Example, to_example
from rlinf_plugins_text.rows.tokenizer import TextTokenizer

VERSION = 3
"""Of the files and of how text becomes tokens."""
AT_ONCE = 1000
"""Texts that are tokenised together, by all cores."""


@dataclass(frozen=True)
class TokenStore:
    """The tokens of a dataset's texts, one after the other, in files."""

    folder: Path

    def array(self, name: str) -> NDArray[Any]:
        """One of the arrays, mapped: `tokens` int32 [N], `trained` bool [N], `ends` int64 [E + 1] of the E texts, and
        `held_out` bool [E], which of them come from files or a split of their own.
        """
        mapped: NDArray[Any] = np.load(self.folder / f"{name}.npy", mmap_mode="r")
        return mapped

    def digest(self) -> str:
        """A hash of the tokens, of which are trained and of which are held out: the same wherever the files lie."""
        return (self.folder / "digest.txt").read_text()

    def where(self, text: int) -> str:
        """Where a text comes from, for messages."""
        return (self.folder / "where.txt").read_text(encoding="utf-8").splitlines()[text]


def open_store(config: TextDatasetConfig, tokenizer: TextTokenizer) -> TokenStore:
    """The tokens of a dataset; made now if they are not on disk.

    Raises:
        UserError: A row cannot be read, named with its file and line; or nothing is trained.
    """
    said = config.model_dump(include={"format", "keys", "roles", "as_chat", "loss_on", "repo_id", "subset", "split"})
    parts = [VERSION, said, config.validation_split, content_tag(config), _tokenizer_tag(tokenizer)]
    name = hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=12).hexdigest()
    folder = cache_folder() / "text" / name
    if not (folder / "ends.npy").exists():
        _make(config, tokenizer, folder)
    return TokenStore(folder)


def cache_folder() -> Path:
    """Where data that can be made again are kept."""
    return Path(os.environ.get("RLINF_CACHE", "~/.cache/rlinf_core")).expanduser()


def _tokenizer_tag(tokenizer: TextTokenizer) -> str:
    file = (tokenizer.folder / "tokenizer.json").read_bytes()
    rest = json.dumps([tokenizer.template_source, tokenizer.special_tokens]).encode()
    return hashlib.blake2b(file + rest, digest_size=12).hexdigest()


def _make(config: TextDatasetConfig, tokenizer: TextTokenizer, folder: Path) -> None:
    """Write the files aside, then give the folder its name: another process may do the same."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            _write(config, tokenizer, aside)
            if not folder.exists():
                aside.rename(folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        if (folder / "ends.npy").exists():  # Another process was first.
            return
        raise UserError(
            f"the tokens of {config.repo_id} cannot be written: {error}. Set RLINF_CACHE to a folder with room"
        ) from error


def _write(config: TextDatasetConfig, tokenizer: TextTokenizer, folder: Path) -> None:
    lengths: list[int] = []
    held_out: list[bool] = []
    digest = hashlib.blake2b(digest_size=12)
    with (
        (folder / "tokens").open("wb") as tokens,
        (folder / "trained").open("wb") as trained,
        (folder / "where.txt").open("w", encoding="utf-8") as where,
    ):
        for part in (False, True) if config.validation_files or config.validation_split else (False,):
            for places, examples in _batches(read_rows(config, held_out=part), config, tokenizer):
                for ids, mask in tokenise(examples, tokenizer):
                    tokens.write(ids.tobytes())
                    trained.write(mask.tobytes())
                    digest.update(ids.tobytes() + mask.tobytes())
                    lengths.append(len(ids))
                held_out += [part] * len(places)
                where.write("".join(f"{place}\n" for place in places))
    for name, kind in (("tokens", np.int32), ("trained", np.bool_)):
        raw = folder / name
        size = raw.stat().st_size // np.dtype(kind).itemsize
        np.save(folder / f"{name}.npy", np.memmap(raw, kind, "r", shape=(size,)) if size else np.zeros(0, kind))
        raw.unlink()
    np.save(folder / "held_out.npy", np.array(held_out, np.bool_))
    digest.update(np.array(held_out, np.bool_).tobytes())
    (folder / "digest.txt").write_text(digest.hexdigest())
    np.save(folder / "ends.npy", np.cumsum([0, *lengths], dtype=np.int64))


def _batches(
    rows: Iterable[TextRow], config: TextDatasetConfig, tokenizer: TextTokenizer
) -> Iterator[tuple[list[str], list[Example]]]:
    rows = iter(rows)
    while some := list(islice(rows, AT_ONCE)):
        examples = []
        for place, row in some:
            try:
                examples.append(to_example(row, config, lambda: tokenizer.chat))
                examples[-1].check_unicode()
            except UserError as error:
                raise UserError(f"{place}: {error}") from error
        yield [place for place, _ in some], examples


def tokenise(
    examples: list[Example], tokenizer: TextTokenizer
) -> Iterator[tuple[NDArray[np.int32], NDArray[np.bool_]]]:
    """Tokens [T] of each example, and whether each of them is trained [T].

    A token is trained if it begins in a trained part. A prompt is read as it would be alone, if that makes a difference
    where the completion begins: so it will be when the model is used.
    """
    whole = tokenizer.encode([one.text for one in examples])
    prompts = tokenizer.encode([one.text[: one.prompt] for one in examples])
    apart = [i for i, one in enumerate(examples) if one.prompt and whole[i].ids[: len(prompts[i])] != prompts[i].ids]
    completions = dict(
        zip(apart, tokenizer.encode([examples[i].text[examples[i].prompt :] for i in apart]), strict=True)
    )
    for number, example in enumerate(examples):
        pieces = [(whole[number], 0)]
        if number in completions:
            pieces = [(prompts[number], 0), (completions[number], example.prompt)]
        ids = [token for piece, _ in pieces for token in piece.ids]
        begins = np.array([start + shift for piece, shift in pieces for start, _ in piece.offsets], np.int64)
        mask: NDArray[np.bool_] = np.zeros(len(ids), np.bool_)
        for first, last in example.trained:
            mask |= (begins >= first) & (begins < last)
        if example.whole:
            ids = [*tokenizer.start, *ids, tokenizer.end]
            mask = np.pad(mask, (len(tokenizer.start), 1))
            mask[-1] = True
        yield np.array(ids, np.int32), mask
