"""The tokenizer of a model: the files that transformers writes, read without transformers and so without torch."""

from __future__ import annotations

import functools
from collections.abc import Sequence
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
"""What a tokenizer may consist of; an exported policy carries those that are there."""


class TextTokenizer:
    """A tokenizer with its chat template.

    Args:
        folder: Holds `tokenizer.json` and `tokenizer_config.json`.
        chat_template: Instead of its own: `"chatml"`, the path of a Jinja file, or a template itself.

    Raises:
        UserError: A file is missing or cannot be read.
    """

    def __init__(self, folder: Path, chat_template: str = "") -> None:
        from tokenizers import Tokenizer

        path = folder / "tokenizer.json"
        if not path.is_file():
            raise UserError(
                f"policy.tokenizer: {folder} holds no tokenizer.json. If it holds a tokenizer in another form, write "
                "it anew: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(OTHER_FOLDER)"
            )
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # `tokenizers` raises nothing more special.
            raise UserError(f"policy.tokenizer: {path} cannot be read: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.folder = folder
        self._config = _read_json(folder / "tokenizer_config.json")
        self.special_tokens = _special_tokens(self._config | _read_json(folder / "special_tokens_map.json"))
        self._template_source = template_source(chat_template) if chat_template else self._own_template()

    @functools.cached_property
    def chat(self) -> ChatTemplate:
        """The chat template. Raises `UserError` if there is none."""
        if not self._template_source:
            raise UserError(
                f"the tokenizer in {self.folder} has no chat template: set policy.chat_template, or use a format that "
                "is no chat (data.format, data.as_chat)"
            )
        return ChatTemplate(self._template_source, self.special_tokens)

    @property
    def template_source(self) -> str:
        """The chat template; empty: there is none."""
        return self._template_source

    @property
    def size(self) -> int:
        """The largest id and one more."""
        return int(max(self._tokenizer.get_vocab(with_added_tokens=True).values())) + 1

    @functools.cached_property
    def end(self) -> int:
        """The end-of-text token. Raises `UserError` if the tokenizer names none."""
        return self._id("eos_token")

    @functools.cached_property
    def start(self) -> tuple[int, ...]:
        """The tokens that precede every text: one that begins it, for tokenizers that add it."""
        whole, plain = (self._tokenizer.encode("a", add_special_tokens=special).ids for special in (True, False))
        places = [place for place in range(len(whole)) if whole[place : place + len(plain)] == plain]
        return tuple(whole[: places[0]]) if places else ()

    def id_of(self, name: str) -> int | None:
        """The id of a special token (`eos_token`, ...); None if there is none."""
        token = self.special_tokens.get(name)
        return None if token is None else self._tokenizer.token_to_id(token)

    def encode(self, texts: Sequence[str]) -> list[Any]:
        """`tokenizers` encodings with `ids` and character `offsets`, without special tokens of its own."""
        encodings: list[Any] = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return encodings

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, with special ones."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=False)
        return text

    def _id(self, name: str) -> int:
        found = self.id_of(name)
        if found is None:
            raise UserError(f"the tokenizer in {self.folder} names no {name}: add it to its tokenizer_config.json")
        return found

    def _own_template(self) -> str:
        path = self.folder / "chat_template.jinja"
        if path.is_file():
            return _read_text(path)
        template = self._config.get("chat_template") or ""
        if isinstance(template, list):  # Several, by name.
            named = [one.get("template") for one in template if isinstance(one, dict) and one.get("name") == "default"]
            template = named[-1] if named else ""
        if not isinstance(template, str):
            raise UserError(f"{self.folder / 'tokenizer_config.json'}: its chat_template is no text")
        return template


@functools.lru_cache(maxsize=4)
def load_tokenizer(folder: Path, chat_template: str) -> TextTokenizer:
    """A tokenizer, read once a process."""
    return TextTokenizer(folder, chat_template)


def template_source(chat_template: str) -> str:
    """The template that `policy.chat_template` means.

    Raises:
        UserError: It is neither a template nor a file.
    """
    if chat_template == "chatml":
        return CHATML
    if "{%" in chat_template or "{{" in chat_template:
        return chat_template
    try:
        return Path(chat_template).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: of a home that there is not.
        raise UserError(
            f'policy.chat_template is neither "chatml", nor a template, nor a file that can be read: {error}'
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
        raise UserError(f"{path} is no JSON: {error}") from error
    if not isinstance(table, dict):
        raise UserError(f"{path} holds no table of settings")
    return table


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """`eos_token` and others; older files write them as tables."""
    found = {}
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        token = config.get(name)
        if isinstance(token, dict):
            token = token.get("content")
        if isinstance(token, str):
            found[name] = token
    return found
