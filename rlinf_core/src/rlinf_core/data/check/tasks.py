"""Check that the tasks that `meta/episodes` lists for an episode are those of its frames; see `check.files`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from rlinf_core.data.check.findings import FileFinding
from rlinf_core.data.lerobot.files import data_files_below, read_json_lines, read_parquet
from rlinf_core.data.lerobot.metadata import Metadata
from rlinf_core.data.lerobot.rows import Rows
from rlinf_core.errors import UserError

LONGEST = 60
"""Characters of a text that a message shows."""


def check_listed_tasks(metadata: Metadata, rows: Rows) -> Iterator[FileFinding]:
    """Report episodes with a frame whose task is not among the listed ones; more may be listed, as GR00T's are.

    Args:
        metadata: The whole dataset's.
        rows: All rows of the episodes to check.
    """
    v3 = metadata.version == "v3.0"
    name = "meta/episodes" if v3 else "meta/episodes.jsonl"
    try:
        listed = _listed_v3(metadata) if v3 else _listed_v2(metadata)
    except UserError:
        return  # lerobot's older tools list none; files that cannot be read are found elsewhere.
    task, texts = rows.columns["task_index"], metadata.task_texts
    for number, start, stop in zip(
        metadata.episodes[rows.places].tolist(), rows.starts.tolist(), rows.stops.tolist(), strict=True
    ):
        said = listed.get(number)
        used = [texts[one] for one in np.unique(task[start:stop]).tolist() if one in texts]
        missing = [text for text in used if text not in (said or used)]
        if missing:
            what = (
                f"lists the task {_short((said or [''])[0])}, but frames of the episode have {_short(missing[0])}: "
                "prompts follow the frames"
            )
            yield FileFinding("other_task", what, name, number)


def _listed_v2(metadata: Metadata) -> dict[int, list[str]]:
    """Episode -> its listed tasks."""
    lines = read_json_lines(metadata.root / "meta/episodes.jsonl", ("episode_index", "tasks"))
    return {one["episode_index"]: _texts(one["tasks"]) for one in lines}


def _listed_v3(metadata: Metadata) -> dict[int, list[str]]:
    tables = [
        read_parquet(path, ["episode_index", "tasks"]) for path in data_files_below(metadata.root / "meta/episodes")
    ]
    listed: dict[int, list[str]] = {}
    for table in tables:
        for number, said in zip(table["episode_index"].to_pylist(), table["tasks"].to_pylist(), strict=True):
            listed[number] = _texts(said)
    return listed


def _texts(said: Any) -> list[str]:
    """A list of texts; some tools write one text."""
    return [str(one) for one in said] if isinstance(said, list) else [str(said)] if said else []


def _short(text: str) -> str:
    return repr(text if len(text) <= LONGEST else text[:LONGEST] + "...")
