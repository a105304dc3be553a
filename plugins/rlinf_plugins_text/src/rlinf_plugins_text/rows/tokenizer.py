"""A model's tokenizer: files written by transformers, read without transformers and therefore without torch."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from rlinf_core import UserError
from rlinf_core.untrusted import read_json
from rlinf_plugins_text.rows.chat import CHATML, ChatTemplate

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


class TextTokenizer:
    """A tokenizer with its chat template.

    Args:
        folder: The folder with `tokenizer.json` and `tokenizer_config.json`.
        chat_template: Replaces its own template: `"chatml"`, the path of a Jinja file, or the template itself.
        arguments: Further variables of the template.
        date: The date that the template may write, as `YYYY-MM-DD`; empty: today.

    Raises:
        UserError: A file is missing or cannot be read.
    """

    def __init__(
        self, folder: Path, chat_template: str = "", *, arguments: Mapping[str, Any] | None = None, date: str = ""
    ) -> None:
        from tokenizers import Tokenizer

        path = folder / "tokenizer.json"
        if not path.is_file():
            raise UserError(
                f"policy.tokenizer: {folder} has no tokenizer.json. Convert a tokenizer in another format with "
                "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(OTHER_FOLDER)"
            )
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # `tokenizers` raises plain `Exception`.
            raise UserError(f"policy.tokenizer: {path} cannot be read: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.folder = folder
        self._config = _read_json(folder / "tokenizer_config.json")
        self.special_tokens = _special_tokens(self._config | _read_json(folder / "special_tokens_map.json"))
        self._template_source = template_source(chat_template) if chat_template else self._own_template()
        self._arguments, self._date = dict(arguments or {}), date

    @functools.cached_property
    def chat(self) -> ChatTemplate:
        """The chat template. Raises `UserError` if there is none."""
        if not self._template_source:
            raise UserError(
                f"the tokenizer in {self.folder} has no chat template: set policy.chat_template to "
                '"chatml" or to a Jinja file; prompts with completions need none if data.as_chat = false'
            )
        return ChatTemplate(self._template_source, self.special_tokens, arguments=self._arguments, date=self._date)

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

    @property
    def size(self) -> int:
        """Largest id plus one."""
        return int(max(self._tokenizer.get_vocab(with_added_tokens=True).values())) + 1

    @functools.cached_property
    def control(self) -> frozenset[int]:
        """The ids of special tokens, which no other text gives."""
        added = self._tokenizer.get_added_tokens_decoder()
        named = (self.id_of(name) for name in ("bos_token", "eos_token"))
        return frozenset(id for id, token in added.items() if token.special) | frozenset(
            one for one in named if one is not None
        )

    @functools.cached_property
    def end(self) -> int:
        """The end-of-text token. Raises `UserError` if the tokenizer has none."""
        return self._id("eos_token")

    @functools.cached_property
    def start(self) -> tuple[int, ...]:
        """The tokens that begin every text; empty for tokenizers that add none."""
        whole, plain = (self._tokenizer.encode("a", add_special_tokens=special).ids for special in (True, False))
        places = [place for place in range(len(whole)) if whole[place : place + len(plain)] == plain]
        return tuple(whole[: places[0]]) if places else ()

    def id_of(self, name: str) -> int | None:
        """The id of a special token (`eos_token`, ...); None if there is none."""
        token = self.special_tokens.get(name)
        return None if token is None else self._tokenizer.token_to_id(token)

    def token_id(self, token: str) -> int | None:
        """The id of a token by its text; None if there is none."""
        found: int | None = self._tokenizer.token_to_id(token)
        return found

    def encode(self, texts: Sequence[str]) -> list[Any]:
        """Encodings of `tokenizers` with `ids` and character `offsets`; no special tokens are added."""
        encodings: list[Any] = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return encodings

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, including special ones."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=False)
        return text

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
        if isinstance(template, list):  # Several named templates.
            named = [one.get("template") for one in template if isinstance(one, dict) and one.get("name") == "default"]
            template = named[-1] if named else ""
        if not isinstance(template, str):
            raise UserError(f"{self.folder / 'tokenizer_config.json'}: its chat_template must be text")
        return template


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
