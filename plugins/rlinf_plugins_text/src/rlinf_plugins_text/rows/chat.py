"""Chat templates: from messages to text, and which parts of the text are the assistant's. Imports no torch.

A template is a program from outside: `model_files` calls this in a process with limits.

Templates are Jinja, rendered as in transformers. The assistant's parts are those that the template marks by
`{% generation %}`; in a template without such marks, `turns` finds them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

from rlinf_core import UserError
from rlinf_core.errors import did_you_mean
from rlinf_plugins_text.rows.shapes import IMAGE, arguments_of, as_parts
from rlinf_plugins_text.rows.turns import REASONING, Message, Span, find_lost, find_turns, way_out

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


OWN = frozenset({"messages", "tools", "add_generation_prompt", "raise_exception", "strftime_now"})
"""Variables of templates that no setting may replace."""


class RejectedError(UserError):
    """A template cannot render a chat at all."""


@dataclass(frozen=True)
class Chat:
    """A rendered chat."""

    text: str
    spans: list[Span]
    """The assistant's parts, each including the token that ends it, if the template writes one."""
    dropped: tuple[str, ...] = ()
    """Thoughts of earlier turns that the template leaves out, as some families' templates do on purpose."""


class ChatTemplate:
    """A compiled template.

    Args:
        source: The template, in Jinja.
        special_tokens: The tokenizer's special tokens by the names that templates use (`bos_token`, ...).
        arguments: Further variables of the template, such as `enable_thinking`.
        date: The date that `strftime_now` formats, as `YYYY-MM-DD`; empty: today.

    Raises:
        UserError: The template is invalid, or does not read one of the arguments.
    """

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str],
        *,
        arguments: Mapping[str, Any] | None = None,
        date: str = "",
    ) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _refuse
        self.date = date
        """As `YYYY-MM-DD`; empty: today. May be set before anything is rendered."""
        environment.globals["strftime_now"] = lambda form: (
            datetime.fromisoformat(self.date) if self.date else datetime.now()
        ).strftime(form)
        try:
            self._template = environment.from_string(source)
            tree = environment.parse(source)
            self.variables = frozenset(meta.find_undeclared_variables(tree))
            self.reads_date = any(name.name == "strftime_now" for name in tree.find_all(nodes.Name))
            """Whether the text depends on the date."""
        except (jinja2.TemplateError, RecursionError) as error:
            raise UserError(f"policy.chat_template is not a valid template: {error}") from error
        self.source = source
        self._special_tokens = dict(special_tokens)
        self._arguments = dict(arguments or {})
        self._marks = re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", source) is not None
        if unread := sorted(self._arguments.keys() - self.accepted):
            raise UserError(
                f"policy.chat_template_kwargs: the chat template does not read {unread[0]!r}"
                f"{did_you_mean(unread[0], sorted(self.accepted))}"
            )

    @property
    def accepted(self) -> frozenset[str]:
        """The names of the variables that a setting or a column may give the template."""
        return self.variables - OWN - self._special_tokens.keys()

    def render(self, messages: Sequence[Message], *, ask: bool = False) -> str:
        """The text of messages; with `ask`, followed by the prompt for the assistant's next turn."""
        every = self._forms(messages)[0]
        return self._render(as_parts(messages, every=every), ask, None, {}).replace(OPEN, "").replace(CLOSE, "")

    def spans(self, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> tuple[str, list[Span]]:
        """The text of messages and the assistant's parts; see `read`."""
        chat = self.read(messages, tools)
        return chat.text, chat.spans

    def read(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> Chat:
        """Render a chat, find the assistant's parts, and check that nothing of the chat is left out.

        Args:
            messages: The chat.
            tools: The tools that the assistant may call, for templates that write them.
            arguments: Further variables of the template for this chat, before those of the settings.

        Raises:
            UserError: The template has no marks and the assistant's parts cannot be found (see `turns`), or it leaves
                out words of a message, a call, or a tool.
        """
        errors = []
        for every in self._forms(messages):
            for form in arguments_of(messages):
                try:
                    return self._read(form, tools, dict(arguments or {}), every)
                except UserError as error:
                    errors.append(error)
        # What is left out says more than that a form is rejected.
        raise next((error for error in errors if not isinstance(error, RejectedError)), errors[0])

    def _forms(self, messages: Sequence[Message]) -> Sequence[bool]:
        """Whether the content of every message is a list of parts: which forms to try, the usual one first.

        Templates of vision-language models take parts; some of them (SmolVLM's) take nothing else.
        """
        if any(isinstance(one["content"], str) and IMAGE in one["content"] for one in messages):
            return (True, False)
        return (False, True) if re.search(r"""["']type["']|\.type\b""", self.source) else (False,)

    def _read(
        self, messages: Sequence[Message], tools: Sequence[Any] | None, arguments: Mapping[str, Any], every: bool
    ) -> Chat:
        def marked(some: Sequence[Message], ask: bool, its: Sequence[Any] | None = tools) -> str:
            return self._render(as_parts(some, every=every), ask, its, arguments)

        if self._marks:
            text, spans = self._marked(marked(messages, False))
        else:
            text, spans = find_turns(marked, messages)

        def plain(some: Sequence[Message], its: Sequence[Any] | None) -> str:
            return marked(some, False, its).replace(OPEN, "").replace(CLOSE, "")

        return Chat(text, spans, _earlier_thoughts(plain, messages, tools, text, self.source))

    def _marked(self, rendered: str) -> tuple[str, list[Span]]:
        text, spans = "", []
        for part in rendered.split(OPEN):
            said, end, rest = part.partition(CLOSE)
            if end:
                spans.append((len(text), len(text) + len(said)))
            text += said + rest
        return text, spans

    def _render(
        self, messages: Sequence[Message], ask: bool, tools: Sequence[Any] | None, arguments: Mapping[str, Any]
    ) -> str:
        given = {"documents": None, **self._arguments, **arguments}
        own = {"messages": messages, "tools": tools, "add_generation_prompt": ask, **self._special_tokens}
        try:
            return self._template.render(**(given | own))
        except MemoryError:  # The limit of the process, not an error of these messages.
            raise
        except Exception as error:  # A template is code and can raise anything, such as ZeroDivisionError.
            wanted = way_out(messages, "takes such messages", tools=bool(tools))
            raise RejectedError(f"the chat template rejects the messages: {error}; {wanted}") from error


def _earlier_thoughts(
    render: Callable[[Sequence[Message], Sequence[Any] | None], str],
    messages: Sequence[Message],
    tools: Sequence[Any] | None,
    text: str,
    source: str,
) -> tuple[str, ...]:
    """The thoughts of earlier turns that the text lacks. Raises `UserError` if it lacks anything else."""
    dropped = []
    for lost in find_lost(render, messages, tools, text):
        if lost.what in REASONING and lost.message != len(messages) - 1:
            dropped.append(f"{lost.what} of earlier turns")
            continue
        where = "" if lost.message is None else f" of message {lost.message} ({messages[lost.message]['role']})"
        words = lost.words if len(lost.words) <= 60 else f"{lost.words[:60]}..."
        read = [key for key in ("reasoning_content", "thinking") if lost.what in REASONING[:-1] and key in source]
        renamed = f"It reads {read[0]!r}: set data.keys = {{ {read[0]} = {lost.what!r} }}. Or s" if read else "S"
        raise UserError(
            f"the chat template leaves out {lost.what}{where}: {words!r}. {renamed}et policy.chat_template to a "
            "template that writes it, or remove it from the data"
        )
    return tuple(dict.fromkeys(dropped))


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
