"""The image files that a run trains on: recorded in its checkpoints, and compared when it continues. Torch-free.

The fingerprint of the rows covers numbers and texts, not pixels. So the videos, and the data files with images, of the
training rows are recorded by size and a digest of a few parts (`data.images.evidence`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from rlinf_core.contract.datasets import FileSource, SampleSource
from rlinf_core.data.images.evidence import differing, evidence_of_images
from rlinf_core.errors import UserError
from rlinf_core.files import write_text
from rlinf_core.training.checkpoint.state import read_state
from rlinf_core.untrusted.text import read_json

FILE = "image_files.json"
"""The record, in the run's folder and in its checkpoints."""
LISTED = 5
"""Files that a message lists."""

Record = dict[str, str]
"""Name of a file, after that of its dataset in a mixture -> its size and digest."""


def record_images(rows: Iterable[tuple[str, SampleSource]]) -> Record:
    """The image files of some training rows, each with the name of its dataset in the mixture."""
    found: Record = {}
    for name, source in rows:
        if isinstance(source, FileSource):
            evidence = evidence_of_images(source)
            found |= {f"{name}: {file}" if name else file: one for file, one in evidence.items()}
    return found


def write_record(folder: Path, record: Record) -> None:
    """Write the record to the run's folder; without images there is none."""
    if not record:
        (folder / FILE).unlink(missing_ok=True)  # Of before the run's config changed.
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / FILE, json.dumps(record, indent=0) + "\n")


def changed_since(folder: Path, record: Record) -> str:
    """The differences from what is recorded in the run's folder or in a checkpoint; empty if there are none.

    A checkpoint of an early version has no record, and nothing differs from it.

    Raises:
        UserError: The record cannot be read.
    """
    path = folder / FILE
    try:
        before = read_json(path)
        if not isinstance(before, dict) or not all(isinstance(one, str) for one in before.values()):
            raise ValueError("it is not a record of image files")
    except FileNotFoundError:
        return ""
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}. Remove it, and the images are not compared") from error
    found = differing(before, record)
    more = f" and {len(found) - LISTED} more" if len(found) > LISTED else ""
    return ", ".join(found[:LISTED]) + more


def compare_images(checkpoint: Path, record: Record, *, allow_change: bool) -> str:
    """Compare the images with those that a checkpoint was trained on; returns the permitted differences.

    Raises:
        UserError: They differ, and `allow_change` is False.
    """
    if FILE not in read_state(checkpoint).files:
        return ""
    changes = changed_since(checkpoint, record)
    if changes and not allow_change:
        raise UserError(
            f"{checkpoint} was trained on other image files than the dataset now has: {changes}. Restore them, use "
            "another runner.name, or, if they show what the rows say, continue with --allow-change"
        )
    return changes
