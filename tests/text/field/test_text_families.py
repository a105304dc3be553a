"""The model families' own chat templates, as TRL ships them: the text of transformers, turns with the ends of TRL."""

import importlib.util
from pathlib import Path

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from rlinf_core import UserError
from rlinf_plugins_text.rows.chat import ChatTemplate

TRL = importlib.util.find_spec("trl")
FOLDER = Path(TRL.origin).parent / "chat_templates" if TRL and TRL.origin else Path("none")
FAMILIES = ("deepseekv3", "gemma3", "glm4moe", "gptoss", "lfm2_2_5", "llama3", "llama3_2", "nemotron_3_nano", "phi3")
FAMILIES += ("qwen2_5", "qwen3", "qwen3_5_nothink", "qwen3_5_think", "qwen3_8")
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
CITY = {"type": "object", "properties": {"city": {"type": "string", "description": "where"}}, "required": ["city"]}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "The weather.", "parameters": CITY}}]


def user(text):
    return {"role": "user", "content": text}


def said(text, **more):
    return {"role": "assistant", "content": text, **more}


CALL = {"type": "function", "id": "abcdefghi", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
CHATS = {
    "turns": ([user("Open it."), said("Done."), user("And?"), said("Closed.")], None),
    "calls": (
        [
            user("Rome?"),
            said("", tool_calls=[CALL]),
            {"role": "tool", "name": "weather", "tool_call_id": "abcdefghi", "content": "sunny"},
            said("It is sunny."),
        ],
        TOOLS,
    ),
    "thoughts": (
        [
            user("Where?"),
            said("Here.", reasoning_content="I look."),
            user("Sure?"),
            said("Yes.", reasoning_content="It is so."),
        ],
        None,
    ),
}
WITHOUT = {
    "calls": ("deepseekv3", "gemma3", "llama3", "phi3"),
    "thoughts": ("deepseekv3", "gemma3", "gptoss", "lfm2_2_5", "llama3", "llama3_2", "phi3", "qwen2_5"),
}
"""Templates that leave tools or `reasoning_content` out, so that rows with them are refused."""


@pytest.mark.skipif(not FOLDER.is_dir(), reason="TRL is not installed")
@pytest.mark.parametrize("family", FAMILIES)
def test_chats_are_those_of_transformers_and_turns_end_as_in_trl(family):
    source = (FOLDER / f"{family}.jinja").read_text()
    for name, (messages, tools) in CHATS.items():
        if family in WITHOUT.get(name, ()):
            with pytest.raises(UserError, match=r"leaves out|cannot be found|rejects the messages"):
                ChatTemplate(source, TOKENS).read(messages, tools)
            continue
        chat = ChatTemplate(source, TOKENS).read(messages, tools)
        rendered = render_jinja_template([messages], tools=tools, chat_template=source, **TOKENS)[0][0]
        assert chat.text == rendered, name
        parts = [chat.text[first:last].strip() for first, last in chat.spans]
        assert len(parts) == 2, name
        training = FOLDER / f"{family}_training.jinja"
        if not training.exists() or family == "glm4moe":  # GLM's ends are in the next turn: test_text_ends.py.
            continue
        theirs = ChatTemplate(training.read_text(), TOKENS).read(messages, tools)
        marked = [theirs.text[first:last].strip() for first, last in theirs.spans]
        for ours, other in zip(parts, marked, strict=False):
            assert other.endswith(ours) or ours.startswith(other), name  # Phi-3's last turn has one more token.
