"""Where in a run a checkpoint stands, and which checkpoint is the newest. Torch-free."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from rlinf_core.errors import UserError
from rlinf_core.training.stopping import Best

FORMAT = 3
NO_BEST = Best()


@dataclass(frozen=True)
class Position:
    """Where in the run a checkpoint stands."""

    step: int
    """Finished optimizer steps."""
    epoch: int
    """Passes over the data that are complete."""
    sample: int
    """Samples of the current epoch that were consumed, over all ranks."""
    rows: int
    """Rows of the training split; with another number the order would be another."""
    seed: int
    """The run's seed; with epoch and sample it determines every further draw."""
    layout: str
    """Tag of parameter names and shapes."""
    validated: int = 0
    """The last step after which there was a validation."""
    best: Best = NO_BEST
    """The best validation so far."""
    data: str = ""
    """What the rows are made of; empty where the origin of the statistics tells (`training.statistics`)."""
    format: int = FORMAT


def step_name(step: int) -> str:
    """The name of a checkpoint's folder; names sort as steps do."""
    return f"step_{step:09d}"


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None."""
    pointer = folder / "latest"
    if not pointer.exists():
        return None
    path = folder / "checkpoints" / pointer.read_text().strip()
    if not (path / "state.json").exists():
        raise UserError(
            f"{pointer} names {path.name}, which is not in {path.parent}. Restore it, write "
            f"the name of another one into {pointer.name}, or --overwrite to start afresh."
        )
    return path


def read_position(path: Path) -> Position:
    """The position of a checkpoint."""
    try:
        state = json.loads((path / "state.json").read_text())
        if state["format"] != FORMAT:
            raise UserError(f"{path} has checkpoint format {state['format']}; this version reads {FORMAT}.")
        return Position(**state | {"best": Best(**state["best"])})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{path / 'state.json'} is damaged ({error}). Write the name of another checkpoint into "
            f"{path.parents[1] / 'latest'}, or --overwrite to start afresh."
        ) from error
