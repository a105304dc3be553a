"""The prompts of rows: the texts that `task_index`, or the column that `data.prompt_column` names, refers to.

A column of integers indexes the dataset's tasks (GR00T's `annotation.human.action.task_description`), a column of
strings holds the texts themselves (`language_instruction` of DROID's and Open X-Embodiment's conversions). Texts are
kept once, beside a number per row.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from rlinf_core.data.lerobot.columns import numbers_of, width_of
from rlinf_core.data.lerobot.files import read_parquet
from rlinf_core.data.lerobot.metadata import AGAIN, Metadata
from rlinf_core.data.lerobot.modality import annotation_columns
from rlinf_core.errors import UserError

PROMPT = "rlinf_prompt"
"""Beside the dataset's columns: int64 [N], each row's number of its prompt; absent if that is `task_index`."""
TEXTS = "rlinf_prompt_texts"
"""Beside the dataset's columns: the texts of a column of strings, as JSON in UTF-8, uint8 [bytes]."""
STRINGS = ("string", "text", "str", "utf8", "large_string", "object")
"""dtypes in `meta/info.json` of columns of texts. lerobot's `language` is another: lists of structures."""
INTEGERS = ("int", "uint")
ANNOTATION = "annotation."
INSTRUCTIONS = ("language", "instruction")
"""What the name of a column of texts contains if the texts are instructions."""


def check_prompt_column(metadata: Metadata, column: str) -> None:
    """Raise `UserError` unless `data.prompt_column` names a column of integers or of texts."""
    feature = metadata.feature(column, "data.prompt_column")
    kind = feature["dtype"]
    if not kind.startswith((*INTEGERS, *STRINGS)) or width_of(feature) != 1:
        raise UserError(
            f"data.prompt_column names {column!r}, which contains {kind} {list(feature.get('shape') or ())}; a text or "
            "a number of a task per row is needed"
        )


def prompts_of(column: pa.ChunkedArray, what: str) -> tuple[NDArray[np.int64], list[str] | None]:
    """A column -> [rows] numbers and, if it contains texts, these texts, which the numbers index.

    Args:
        column: Integers, or texts; some writers store lists of one. A missing text is empty.
        what: The start of error messages.

    Raises:
        UserError: The column contains neither, or a number is not an integer.
    """
    nested = pa.types.is_nested(column.type)
    if not _holds_texts(getattr(column.type, "value_type", column.type) if nested else column.type):
        numbers = numbers_of(column, what)
        with np.errstate(invalid="ignore"):  # NaN, which differs from what it becomes.
            rounded: NDArray[np.int64] = numbers.astype(np.int64)
        if (rounded != numbers).any():
            raise UserError(f"{what} contains {numbers[rounded != numbers][0]}, which is not the number of a task")
        return rounded, None
    try:
        single = pc.list_element(column.combine_chunks(), 0) if nested else column
        encoded = pc.dictionary_encode(pc.fill_null(single.cast(pa.large_string()), ""))
        encoded = encoded.combine_chunks() if isinstance(encoded, pa.ChunkedArray) else encoded
        texts: list[str] = encoded.dictionary.to_pylist()
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"{what} does not contain one text in UTF-8 per row ({error}): {AGAIN}") from error
    return encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64), texts


def _holds_texts(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_binary(kind))


def joined_prompts(parts: Sequence[tuple[NDArray[np.int64], list[str] | None]]) -> dict[str, NDArray[Any]]:
    """`PROMPT` and, for texts, `TEXTS` of several files; texts are numbered in their order, whatever the files'."""
    if all(texts is None for _, texts in parts):
        return {PROMPT: np.concatenate([numbers for numbers, _ in parts])}
    texts = sorted({text for _, own in parts for text in own or ()})
    number_of = {text: number for number, text in enumerate(texts)}
    mapped = [np.array([number_of[text] for text in own or ()], np.int64) for _, own in parts]
    numbers = [new[old] for (old, _), new in zip(parts, mapped, strict=True)]
    encoded = np.frombuffer(json.dumps(texts).encode(), np.uint8).copy()
    return {PROMPT: np.concatenate(numbers), TEXTS: encoded}


def texts_of(columns: Mapping[str, NDArray[Any]], metadata: Metadata) -> Mapping[int, str]:
    """The texts of the rows' prompts by number."""
    if TEXTS not in columns:
        return metadata.task_texts
    return dict(enumerate(json.loads(columns[TEXTS].tobytes())))


def other_prompts(metadata: Metadata, file: Path, row: int) -> dict[str, str]:
    """The columns besides `task_index` that hold an instruction or index the tasks -> their text in a row.

    Columns whose texts are those of `task_index` in the whole file are left out, and so are those that index other
    tables.

    Args:
        metadata: The dataset's metadata.
        file: A data file.
        row: A row in it.
    """
    names = [name for name, feature in metadata.features.items() if _may_be_prompt(name, feature)]
    names += [name for name in annotation_columns(metadata.root) if name in metadata.features]
    names = [name for name in dict.fromkeys(names) if name != "task_index"]
    if not names:
        return {}
    try:
        table = read_parquet(file, ["task_index", *names], ["task_index", *names])
        numbers = (
            prompts_of(table["task_index"], "task_index")[0].tolist() if "task_index" in table.column_names else []
        )
    except UserError:
        return {}  # Only a hint: what the run needs of the file has been read.
    own, found = [metadata.task_texts.get(number) for number in numbers], dict[str, str]()
    for name in names:
        texts = _texts(metadata, table, name)
        if texts is not None and texts != own and any(texts):
            found[name] = texts[row]
    return found


def _may_be_prompt(name: str, feature: Mapping[str, Any]) -> bool:
    if width_of(feature) != 1:
        return False
    if feature["dtype"].startswith(STRINGS):
        return any(word in name.lower() for word in INSTRUCTIONS)
    return name.startswith(ANNOTATION) and feature["dtype"].startswith(INTEGERS)


def _texts(metadata: Metadata, table: pa.Table, name: str) -> list[str] | None:
    """The text of every row; None if the column is not there or refers to other things than tasks."""
    try:
        numbers, texts = prompts_of(table[name], name)
    except (KeyError, UserError):
        return None
    known: Mapping[int, str] = metadata.task_texts if texts is None else dict(enumerate(texts))
    if not set(np.unique(numbers).tolist()) <= known.keys():
        return None
    return [known[number] for number in numbers.tolist()]
