"""Chat templates: from messages to text, and which parts of the text are the assistant's. Imports no torch.

Templates are Jinja, rendered as in transformers. The assistant's parts are those that the template marks by
`{% generation %}`; in a template without such marks, `turns` finds them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

from rlinf_core import UserError
from rlinf_plugins_text.rows.turns import Message, Span, find_turns, way_out

CHATML = """\
{%- for message in messages %}
{%- if tools or message.tool_calls %}
{{- raise_exception('"chatml" writes no tools; the template of the tokenizer may, with chat_template = ""') }}
{%- endif %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' %}
{%- generation %}{{- message.content + '<|im_end|>' }}{%- endgeneration %}
{%- else %}
{{- message.content + '<|im_end|>' }}
{%- endif %}
{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
"""The template selected by `policy.chat_template = "chatml"`: Qwen's, without thoughts."""
OPEN, CLOSE = "\ue0f0\ue0f1", "\ue0f1\ue0f0"
"""Marks around the assistant's parts while a template is rendered: private-use characters."""


class ChatTemplate:
    """A compiled template.

    Args:
        source: The template, in Jinja.
        special_tokens: The tokenizer's special tokens by the names that templates use (`bos_token`, ...).
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            self._template = environment.from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise UserError(f"policy.chat_template is not a valid template: {error}") from error
        self._special_tokens = dict(special_tokens)
        self._marks = re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", source) is not None

    def render(self, messages: Sequence[Message], *, ask: bool = False) -> str:
        """The text of messages; with `ask`, followed by the prompt for the assistant's next turn."""
        return self._render(messages, ask, None).replace(OPEN, "").replace(CLOSE, "")

    def spans(self, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> tuple[str, list[Span]]:
        """The text of messages, and the assistant's parts, each including the token that ends it.

        Args:
            messages: The chat.
            tools: The tools that the assistant may call, for templates that write them.

        Raises:
            UserError: The template has no marks and the assistant's parts cannot be found; see `turns`.
        """
        if self._marks:
            return self._marked(self._render(messages, False, tools))
        return find_turns(lambda some, ask: self._render(some, ask, tools), messages)

    def _marked(self, rendered: str) -> tuple[str, list[Span]]:
        text, spans = "", []
        for part in rendered.split(OPEN):
            said, end, rest = part.partition(CLOSE)
            if end:
                spans.append((len(text), len(text) + len(said)))
            text += said + rest
        return text, spans

    def _render(self, messages: Sequence[Message], ask: bool, tools: Sequence[Any] | None) -> str:
        try:
            return self._template.render(
                messages=messages, tools=tools, documents=None, add_generation_prompt=ask, **self._special_tokens
            )
        except Exception as error:  # A template is code and can raise anything, such as ZeroDivisionError.
            wanted = way_out(messages, "takes such messages", tools=bool(tools))
            raise UserError(f"the chat template rejects the messages: {error}; {wanted}") from error


class _Generation(Extension):
    """The tag `{% generation %} ... {% endgeneration %}`."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        """Put the body between marks."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_say"), [], [], body).set_lineno(line)

    def _say(self, caller: Macro) -> str:
        return f"{OPEN}{caller()}{CLOSE}"


def _tojson(value: Any, **options: Any) -> str:
    """JSON without escaped HTML characters, unlike Jinja's own filter."""
    return json.dumps(value, **({"ensure_ascii": False} | options))


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
