"""Multiple-choice questions as texts: the question with its lettered answers, and the right one. Imports no torch.

The text is the one that RLinf trains vision-language models on for Robo2VLM: `Choices:` and a line per answer, then the
letter and the words of the right one.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from typing import Any

from rlinf_core import UserError
from rlinf_plugins_text.rows.dataset import TextDatasetConfig

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
LONGEST = 100_000
"""Most characters of choices that are stored as one text."""


def asked(row: Mapping[str, Any], config: TextDatasetConfig) -> tuple[str, str]:
    """The question with its choices, and the answer.

    The answer is a letter, an index from 0, or the words of a choice.

    Raises:
        UserError: A column is missing, or the answer is not one of the choices.
    """
    columns = {name: config.column(name) for name in ("question", "choices", "answer")}
    if missing := [column for column in columns.values() if row.get(column) is None]:
        raise UserError(f"no {missing[0]!r}; found: {', '.join(map(str, row)) or 'nothing'} (data.keys renames)")
    question, answer = row[columns["question"]], row[columns["answer"]]
    if not isinstance(question, str):
        raise UserError(f"{columns['question']!r} must be text, not {type(question).__name__}")
    choices = _choices(row[columns["choices"]], columns["choices"])
    place = _place(answer, choices)
    if place is None:
        raise UserError(
            f"{columns['answer']!r} is {answer!r}, which is not one of the {len(choices)} choices: it must be a letter "
            f"(A to {LETTERS[len(choices) - 1]}), an index from 0, or the words of a choice"
        )
    lines = [f"{letter}. {choice}\n" for letter, choice in zip(LETTERS, choices, strict=False)]
    return f"{question}\nChoices:\n{''.join(lines)}", f"{LETTERS[place]}. {choices[place]}"


def _choices(value: Any, column: str) -> list[str]:
    """A list of texts, perhaps written as one text: Python's or JSON's."""
    if isinstance(value, str) and value.lstrip()[:1] == "[" and len(value) <= LONGEST:
        try:
            value = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
            raise UserError(f"{column!r} is text that is not a list: {value[:60]!r}") from error
    if not isinstance(value, Sequence) or isinstance(value, str) or not 1 < len(value) <= len(LETTERS):
        raise UserError(f"{column!r} must be a list of 2 to {len(LETTERS)} choices, not {str(value)[:60]!r}")
    return [str(one) for one in value]


def _place(answer: Any, choices: Sequence[str]) -> int | None:
    if isinstance(answer, bool):
        return None
    if isinstance(answer, int):
        return answer if 0 <= answer < len(choices) else None
    words = str(answer).strip()
    if words in choices:
        return choices.index(words)
    if len(words) == 1 and (place := LETTERS.find(words.upper())) in range(len(choices)):
        return place
    return int(words) if words.isdecimal() and int(words) < len(choices) else None
