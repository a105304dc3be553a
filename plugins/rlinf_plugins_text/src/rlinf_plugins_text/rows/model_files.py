"""What a model's tokenizer and chat template compute, in the process of `confined`. Imports no torch."""

from __future__ import annotations

import functools
import json
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple
from typing import TYPE_CHECKING, Any

from rlinf_core import UserError
from rlinf_plugins_text.rows.chat import ChatTemplate
from rlinf_plugins_text.rows.confined import serve

if TYPE_CHECKING:
    from tokenizers import Tokenizer

LONGEST = 50_000_000
"""Characters that a chat template may write."""
Answer = tuple[Any, bytes]


def main() -> None:
    """Answer the parent."""
    serve({one.__name__: one for one in (vocabulary, find, encode, decode, template, read, render, expand)})


def vocabulary(tokenizer: Sequence[Any]) -> Answer:
    """The size of a tokenizer, its special tokens' ids, and the ids that begin a text: `[size, special, start]`.

    Args:
        tokenizer: Its path, and whatever is another once the file has changed.
    """
    loaded = _tokenizer(*tokenizer)
    with _library(tokenizer):
        special = [id for id, token in loaded.get_added_tokens_decoder().items() if token.special]
        whole, plain = (loaded.encode("a", add_special_tokens=special).ids for special in (True, False))
        places = [place for place in range(len(whole)) if whole[place : place + len(plain)] == plain]
        size = max(loaded.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    return [size, special, whole[: places[0]] if places else []], b""


def find(tokenizer: Sequence[Any], token: str) -> Answer:
    """The id of a token by its text, or None."""
    return _tokenizer(*tokenizer).token_to_id(token), b""


def encode(tokenizer: Sequence[Any], texts: Sequence[str]) -> Answer:
    """The number of tokens of each text; as bytes all ids, then the characters of its text where each token begins."""
    with _library(tokenizer):
        encodings = _tokenizer(*tokenizer).encode_batch(list(texts), add_special_tokens=False)
    ids, begins = array("i"), array("i")
    for one in encodings:
        ids.extend(one.ids)
        begins.extend([begin for begin, _ in one.offsets])
    return [len(one.ids) for one in encodings], ids.tobytes() + begins.tobytes()


def decode(tokenizer: Sequence[Any], ids: Sequence[int]) -> Answer:
    """The text of tokens, including special ones."""
    with _library(tokenizer):
        return _tokenizer(*tokenizer).decode(list(ids), skip_special_tokens=False), b""


def template(chat: Sequence[Any]) -> Answer:
    """The variables that a chat template reads, and whether it writes the date: `[variables, reads_date]`.

    Args:
        chat: The arguments of `ChatTemplate`.
    """
    compiled = _template(json.dumps(chat))
    return [sorted(compiled.variables), compiled.reads_date], b""


def read(chat: Sequence[Any], messages: Any, tools: Any, arguments: Any, date: str) -> Answer:
    """The fields of a `Chat`; see `ChatTemplate.read`."""
    compiled = _template(json.dumps(chat))
    compiled.date = date
    return _short(astuple(compiled.read(messages, tools, arguments))), b""


def render(chat: Sequence[Any], messages: Any, ask: bool, date: str) -> Answer:
    """The text of messages; see `ChatTemplate.render`."""
    compiled = _template(json.dumps(chat))
    compiled.date = date
    return _short((compiled.render(messages, ask=ask),))[0], b""


def expand(folder: str, changes: str, placeholder: str, sizes: Sequence[Sequence[int]]) -> Answer:
    """What a processor writes for images of some sizes; see `vision.processor.expansions`. Imports torch."""
    from rlinf_plugins_text.vision.processor import expansions

    try:
        return expansions(folder, changes, placeholder, [(height, width) for height, width in sizes]), b""
    except (MemoryError, UserError):
        raise
    except Exception as error:  # Files from outside decide what the library does.
        raise UserError(f"{folder}: the processor cannot be used: {type(error).__name__}: {error}") from error


def _short(written: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(written[0]) > LONGEST:
        raise UserError(f"the chat template writes {len(written[0])} characters for a chat, more than {LONGEST}")
    return written


@functools.lru_cache(maxsize=4)
def _tokenizer(path: str, *_: Any) -> Tokenizer:
    from tokenizers import Tokenizer

    with _library([path]):
        tokenizer = Tokenizer.from_file(path)
        tokenizer.no_truncation()
        tokenizer.no_padding()
    return tokenizer


@functools.lru_cache(maxsize=4)
def _template(chat: str) -> ChatTemplate:
    source, special_tokens, arguments = json.loads(chat)
    return ChatTemplate(source, special_tokens, arguments=arguments)


@contextmanager
def _library(tokenizer: Sequence[Any]) -> Iterator[None]:
    try:
        yield
    except (MemoryError, UserError):
        raise
    except BaseException as error:  # `tokenizers` raises plain `Exception`, and Rust's panics are not even that.
        raise UserError(f"policy.tokenizer: {tokenizer[0]} cannot be read: {error}") from error
