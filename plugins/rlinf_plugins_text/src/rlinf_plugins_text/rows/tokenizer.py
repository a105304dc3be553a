"""A model's tokenizer: files written by transformers, read without transformers and therefore without torch."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from rlinf_core import UserError
from rlinf_core.untrusted.text import read_json
from rlinf_plugins_text.rows.chat import CHATML, OWN, Chat, RejectedError
from rlinf_plugins_text.rows.confined import CONFINED, GIB, Limits
from rlinf_plugins_text.rows.turns import Message

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)
"""Files that a tokenizer may consist of; an exported policy includes those that exist."""


TOKENIZER_MEMORY, TEMPLATE_MEMORY = 2 * GIB, 1 * GIB
"""Bytes that reading or using a tokenizer, and rendering a chat, may take at most beyond what their process has."""
MEMORY_PER_CHARACTER = 1024
"""Further bytes for a tokenizer."""
AT_ONCE = 1_000_000
"""Characters that are tokenized in one call, which uses all cores."""
FILE_BYTES = 20
"""Bytes of `tokenizer.json` that may take as much time and memory as a character of a text."""
ERRORS = {error.__name__: error for error in (UserError, RejectedError)}


@dataclass(frozen=True)
class Encoding:
    """A text as tokens."""

    ids: list[int]
    begins: list[int]
    """The character where each token begins."""


class TemplateReader:
    """A chat template, rendered in a process with limits.

    Args:
        source: The template, in Jinja.
        special_tokens: The tokenizer's special tokens by the names that templates use (`bos_token`, ...).
        arguments: Further variables of the template, such as `enable_thinking`.
        date: The date that `strftime_now` formats, as `YYYY-MM-DD`; empty: today.

    Raises:
        UserError: The template is invalid, does not read one of the arguments, or takes more than it may.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str], arguments: Mapping[str, Any], date: str) -> None:
        self.source = source
        self._date = date
        self._chat = [source, dict(special_tokens), dict(arguments)]
        variables, self.reads_date = self._ask("template", len(source))
        self.accepted = frozenset(variables) - OWN - special_tokens.keys()
        """The names of the variables that a setting or a column may give the template."""

    def read(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> Chat:
        """Render a chat and find the assistant's parts; see `ChatTemplate.read`."""
        given = {"messages": messages, "tools": tools, "arguments": dict(arguments or {})}
        text, spans, dropped = self._ask("read", _characters(given), **given, date=self._now())
        return Chat(text, [(first, last) for first, last in spans], tuple(dropped))

    def render(self, messages: Sequence[Message], *, ask: bool = False) -> str:
        """The text of messages; with `ask`, followed by the prompt for the assistant's next turn."""
        text: str = self._ask("render", _characters(messages), messages=messages, ask=ask, date=self._now())
        return text

    def _now(self) -> str:
        return self._date or datetime.now().isoformat()

    def _ask(self, name: str, characters: int, **arguments: Any) -> Any:
        limits = Limits(
            "the chat template",
            'set policy.chat_template to "chatml" or to a Jinja file that you trust',
            TEMPLATE_MEMORY,
            characters,
        )
        value, _ = CONFINED.ask(name, {"chat": self._chat, **arguments}, limits, ERRORS)
        return value


class TextTokenizer:
    """A tokenizer with its chat template. Both are files from outside and work in a process with limits.

    Args:
        folder: The folder with `tokenizer.json` and `tokenizer_config.json`.
        chat_template: Replaces its own template: `"chatml"`, the path of a Jinja file, or the template itself.
        arguments: Further variables of the template.
        date: The date that the template may write, as `YYYY-MM-DD`; empty: today.

    Raises:
        UserError: A file is missing, cannot be read, or takes more time or memory than it may.
    """

    def __init__(
        self, folder: Path, chat_template: str = "", *, arguments: Mapping[str, Any] | None = None, date: str = ""
    ) -> None:
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise UserError(
                f"policy.tokenizer: {folder} has no tokenizer.json. Convert a tokenizer in another format with "
                "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(OTHER_FOLDER)"
            )
        status = path.stat()
        self._file = [str(path.absolute()), status.st_mtime_ns, status.st_size]
        self.folder = folder
        (size, special, start), _ = self._ask("vocabulary", status.st_size // FILE_BYTES)
        self.size: int = size
        """Largest id plus one."""
        self._special = frozenset[int](special)
        self.start: tuple[int, ...] = tuple(start)
        """The tokens that begin every text; empty for tokenizers that add none."""
        self._config = _read_json(folder / "tokenizer_config.json")
        self.special_tokens = _special_tokens(self._config | _read_json(folder / "special_tokens_map.json"))
        self._template_source = template_source(chat_template) if chat_template else self._own_template()
        self._arguments, self._date = dict(arguments or {}), date
        self._ids: dict[str, int | None] = {}
        self._texts: dict[int, str] = {}

    @functools.cached_property
    def chat(self) -> TemplateReader:
        """The chat template. Raises `UserError` if there is none."""
        if not self._template_source:
            raise UserError(
                f"the tokenizer in {self.folder} has no chat template: set policy.chat_template to "
                '"chatml" or to a Jinja file; prompts with completions need none if data.as_chat = false'
            )
        return TemplateReader(self._template_source, self.special_tokens, self._arguments, self._date)

    @property
    def date(self) -> str:
        """The date that the chat template writes, or of today; empty: it writes none."""
        if not self._template_source or "strftime_now" not in self._template_source or not self.chat.reads_date:
            return ""
        return self._date or datetime.now().date().isoformat()

    @property
    def chat_tag(self) -> list[Any]:
        """What the text of a chat depends on besides the chat."""
        return [self._template_source, self.special_tokens, self._arguments, self.date]

    @property
    def template_source(self) -> str:
        """The source of the chat template; empty: there is none."""
        return self._template_source

    @functools.cached_property
    def control(self) -> frozenset[int]:
        """The ids of special tokens, which no other text gives."""
        named = (self.id_of(name) for name in ("bos_token", "eos_token"))
        return self._special | frozenset(one for one in named if one is not None)

    @functools.cached_property
    def end(self) -> int:
        """The end-of-text token. Raises `UserError` if the tokenizer has none."""
        return self._id("eos_token")

    def id_of(self, name: str) -> int | None:
        """The id of a special token (`eos_token`, ...); None if there is none."""
        token = self.special_tokens.get(name)
        return None if token is None else self.token_id(token)

    def token_id(self, token: str) -> int | None:
        """The id of a token by its text; None if there is none."""
        if token not in self._ids:
            self._ids[token], _ = self._ask("find", len(token), token=token)
        return self._ids[token]

    def encode(self, texts: Sequence[str]) -> list[Encoding]:
        """The tokens of texts; no special tokens are added."""
        encodings = []
        for some in _portions(texts):
            lengths, data = self._ask("encode", sum(map(len, some)), texts=some)
            numbers = memoryview(data).cast("i").tolist()
            ids, begins = numbers[: len(numbers) // 2], numbers[len(numbers) // 2 :]
            ends = list(itertools.accumulate(lengths))
            for first, last in zip([0, *ends], ends, strict=False):
                encodings.append(Encoding(ids[first:last], begins[first:last]))
        return encodings

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, including special ones."""
        if len(ids) != 1:
            text, _ = self._ask("decode", len(ids), ids=list(ids))
            return str(text)
        [one] = ids
        if one not in self._texts:
            self._texts[one], _ = self._ask("decode", 1, ids=[one])
        return self._texts[one]

    def _ask(self, name: str, characters: int, **arguments: Any) -> tuple[Any, bytes]:
        limits = Limits(
            f"policy.tokenizer: {self._file[0]}",
            "it is damaged, or made to do so; take a tokenizer that you trust",
            TOKENIZER_MEMORY + MEMORY_PER_CHARACTER * characters,
            characters,
        )
        return CONFINED.ask(name, {"tokenizer": self._file, **arguments}, limits, ERRORS)

    def _id(self, name: str) -> int:
        found = self.id_of(name)
        if found is None:
            raise UserError(f"the tokenizer in {self.folder} has no {name}: add it to its tokenizer_config.json")
        return found

    def _own_template(self) -> str:
        path = self.folder / "chat_template.jinja"
        if path.is_file():
            return _read_text(path)
        template = self._config.get("chat_template") or ""
        if not template:  # Where processors of transformers 4 have it.
            template = _read_json(self.folder / "chat_template.json").get("chat_template") or ""
        if isinstance(template, list):  # Several named templates.
            named = [one.get("template") for one in template if isinstance(one, dict) and one.get("name") == "default"]
            template = named[-1] if named else ""
        if not isinstance(template, str):
            raise UserError(f"{self.folder / 'tokenizer_config.json'}: its chat_template must be text")
        return template


def _portions(texts: Sequence[str]) -> Iterator[list[str]]:
    """Texts in groups of at most `AT_ONCE` characters, or of one text."""
    some: list[str] = []
    size = 0
    for text in texts:
        if some and size + len(text) > AT_ONCE:
            yield some
            some, size = [], 0
        some.append(text)
        size += len(text)
    if some:
        yield some


def _characters(value: Any) -> int:
    """The characters of all texts in a value."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(_characters, value.values()))
    return sum(map(_characters, value)) if isinstance(value, list | tuple) else 1


def load_tokenizer(
    folder: Path, chat_template: str, arguments: Mapping[str, Any] | None = None, date: str = ""
) -> TextTokenizer:
    """A tokenizer, read once per process."""
    return _load(folder, chat_template, json.dumps(arguments or {}), date)


@functools.lru_cache(maxsize=4)
def _load(folder: Path, chat_template: str, arguments: str, date: str) -> TextTokenizer:
    return TextTokenizer(folder, chat_template, arguments=json.loads(arguments), date=date)


def template_source(chat_template: str) -> str:
    """The template that `policy.chat_template` selects.

    Raises:
        UserError: It is neither a template nor a readable file.
    """
    if chat_template == "chatml":
        return CHATML
    if "{%" in chat_template or "{{" in chat_template:
        return chat_template
    try:
        return Path(chat_template).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: there is no home folder.
        raise UserError(
            f'policy.chat_template is neither "chatml", nor a template, nor a readable file: {error}'
        ) from error


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        table = read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(table, dict):
        raise UserError(f"{path} must hold a JSON object")
    return table


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """`eos_token` and others; some files write them as objects with a `content`."""
    found = {}
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        token = config.get(name)
        if isinstance(token, dict):
            token = token.get("content")
        if isinstance(token, str):
            found[name] = token
    return found
