"""Chat templates: from messages to text, and which parts of the text the assistant says. Imports no torch.

Templates are Jinja as transformers renders it. What the assistant says is what the template marks by
`{% generation %}`; in a template without marks it is looked for (`turns`).
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
from rlinf_plugins_text.rows.turns import Message, Span, find_turns

CHATML = """\
{%- for message in messages %}
{%- if tools or message.tool_calls %}{{- raise_exception('"chatml" has no form for tools') }}{%- endif %}
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
"""The template that `policy.chat_template = "chatml"` means: Qwen's without its thoughts."""
OPEN, CLOSE = "\ue0f0\ue0f1", "\ue0f1\ue0f0"
"""What marks the assistant's words while a template is rendered: characters for private use."""


class ChatTemplate:
    """A compiled template.

    Args:
        source: Jinja.
        special_tokens: The tokenizer's, by the names that templates use (`bos_token`, ...).
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
            raise UserError(f"policy.chat_template is no template: {error}") from error
        self._special_tokens = dict(special_tokens)
        self._marks = re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", source) is not None

    def render(self, messages: Sequence[Message], *, ask: bool = False) -> str:
        """The text of messages; with `ask`, up to where the assistant is to speak."""
        return self._render(messages, ask, None).replace(OPEN, "").replace(CLOSE, "")

    def spans(self, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> tuple[str, list[Span]]:
        """The text of messages, and which parts of it the assistant says, each with what ends it.

        Args:
            messages: The chat.
            tools: What the assistant may call, for templates that write it.

        Raises:
            UserError: Without marks, what the assistant says cannot be told; see `turns`.
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
        except Exception as error:  # A template computes: it adds what is no text, divides by zero, looks up nothing.
            raise UserError(f"the chat template refuses the messages: {error}") from error


class _Generation(Extension):
    """The tag `{% generation %} ... {% endgeneration %}`."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        """The body, to be put between marks."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_say"), [], [], body).set_lineno(line)

    def _say(self, caller: Macro) -> str:
        return f"{OPEN}{caller()}{CLOSE}"


def _tojson(value: Any, **options: Any) -> str:
    """Unlike Jinja's own, this leaves HTML characters as they are."""
    return json.dumps(value, **({"ensure_ascii": False} | options))


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
