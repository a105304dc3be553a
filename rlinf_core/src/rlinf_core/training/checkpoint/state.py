"""Where in a run a checkpoint stands, what files it is made of, and which checkpoint is the newest. Torch-free.

Both stand in `state.json`, which is written when everything else of the checkpoint is on disk: a folder without one
that can be read is no checkpoint.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rlinf_core.errors import UserError
from rlinf_core.training.stopping import Best

FORMAT = 4
NO_BEST = Best()
STATE = "state.json"
NAMES = "step_" + "[0-9]" * 9
"""A pattern of checkpoints' names, and of nobody else's folders."""


class DamageError(UserError):
    """A checkpoint is not what was written; the message says what is wrong with it, without naming it."""


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
    data_layout: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """`PolicyConfig.data_layout`."""
    format: int = FORMAT

    def other_layout(self, now: Position) -> str:
        """What of the layout follows from other data than those of now; empty: nothing."""
        return "; ".join(
            f"{name}: {_difference(self.data_layout.get(name, ()), now.data_layout.get(name, ()))}"
            for name in {**self.data_layout, **now.data_layout}
            if list(self.data_layout.get(name, ())) != list(now.data_layout.get(name, ()))
        )


def _difference(before: Sequence[int], now: Sequence[int]) -> str:
    changes = (("new", set(now) - set(before)), ("gone", set(before) - set(now)))
    texts = [f"{len(some)} {kind} ({_first(sorted(some))})" for kind, some in changes if some]
    return f"{len(before)} then, {len(now)} now; " + (", ".join(texts) or "in another order")


def _first(numbers: Sequence[int], most: int = 8) -> str:
    return ", ".join(map(str, numbers[:most])) + ", …" * (len(numbers) > most)


@dataclass(frozen=True)
class FileDigest:
    """What a file of a checkpoint was when it was written."""

    bytes: int
    """Its size."""
    sha256: str
    """Its hash, hexadecimal."""


@dataclass(frozen=True)
class State:
    """The content of `state.json`."""

    position: Position
    """Where the run stood."""
    files: Mapping[str, FileDigest]
    """Every other file of the checkpoint by its name."""


def dump_state(state: State) -> str:
    """The text of `state.json`, which ends with a hash of itself."""
    table = asdict(state.position) | {"files": {name: asdict(state.files[name]) for name in sorted(state.files)}}
    return json.dumps(table | {"sha256": _own_hash(table)}, indent=1)


def _own_hash(table: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()


def read_state(path: Path) -> State:
    """What `state.json` of a checkpoint says.

    Raises:
        DamageError: It is missing, or not as it was written.
        UserError: Another version of this package wrote it.
    """
    try:
        table = json.loads((path / STATE).read_text(encoding="utf-8"))
        form = table["format"]
        if isinstance(form, int) and form != FORMAT:
            raise UserError(f"{path} has checkpoint format {form}; this version reads {FORMAT}.")
        if table.pop("sha256") != _own_hash(table):
            raise DamageError(f"the text of {STATE} does not have its hash")
        files = {_plain(name): FileDigest(**entry) for name, entry in table.pop("files").items()}
        return State(Position(**table | {"best": Best(**table["best"])}), files)
    except FileNotFoundError as error:
        missing = f"it has no {STATE}: it was never completed" if path.is_dir() else "it is not there"
        raise DamageError(missing) from error
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DamageError(f"{STATE} cannot be read ({type(error).__name__}: {error})") from error


def _plain(name: str) -> str:
    """The name of a file in the checkpoint's own folder; raises `ValueError` for a way out of it."""
    if Path(name).name != name:
        raise ValueError(f"{name!r} is not the name of a file in the checkpoint")
    return name


def read_position(path: Path) -> Position:
    """The position of a checkpoint.

    Raises:
        UserError: Its `state.json` is damaged.
    """
    try:
        return read_state(path).position
    except DamageError as error:
        raise UserError(f"{path} is damaged: {error}. Choose another checkpoint.") from error


def step_name(step: int) -> str:
    """The name of a checkpoint's folder; names sort as steps do."""
    return f"step_{step:09d}"


def candidates(folder: Path, checkpoints: Path) -> list[Path]:
    """The checkpoints that a run may continue from, newest first: the one that `latest` names and those before it.

    Args:
        folder: The run's.
        checkpoints: The folder of its checkpoints.
    """
    pointer = folder / "latest"
    if not pointer.exists():
        return []
    names = {path.name for path in checkpoints.glob(NAMES)}
    named = pointer.read_text(encoding="utf-8", errors="replace").strip()
    if Path(named).name == named and named.startswith("step_"):  # Else it is damaged itself.
        names = {name for name in names if name < named} | {named}
    return [checkpoints / name for name in sorted(names, reverse=True)]


def find_damage(path: Path, *, rank: int = 0, ranks: int = 0) -> str:
    """What is wrong with a checkpoint, in words; empty: nothing.

    Args:
        path: The checkpoint.
        rank: Whose share of the hashes is computed.
        ranks: How many share them; 0: nobody computes any, and only sizes are compared.

    Raises:
        UserError: Another version of this package wrote it.
    """
    try:
        files = read_state(path).files
        for name in files:
            if (found := (path / name).stat().st_size) != files[name].bytes:
                return f"{name} has {found} bytes instead of {files[name].bytes}"
        for name in _share(files, rank, ranks):
            with (path / name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != files[name].sha256:
                    return f"the bytes of {name} are not those that were written (sha256)"
    except DamageError as error:
        return str(error)
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        return f"{error.strerror}: {error.filename}"
    return ""


def _share(files: Mapping[str, FileDigest], rank: int, ranks: int) -> list[str]:
    """Every rank's as many and as large files as another's."""
    by_size = sorted(files, key=lambda name: (-files[name].bytes, name))
    return by_size[rank::ranks] if ranks else []


def newest_whole(paths: Sequence[Path], damaged: dict[str, str]) -> tuple[Path, Position] | None:
    """The first checkpoint that is not known to be damaged; None: there is none.

    Only what costs nothing is checked: states and sizes.

    Args:
        paths: Checkpoints, newest first (`candidates`).
        damaged: Checkpoint -> what is wrong with it; findings are added.

    Raises:
        UserError: Another version of this package wrote one.
    """
    for path in paths:
        why = damaged.get(path.name) or find_damage(path)
        if not why:
            return path, read_state(path).position
        damaged[path.name] = why
    return None


def none_whole(checkpoints: Path, damaged: Mapping[str, str], way_out: str) -> UserError:
    """The error where every checkpoint is damaged.

    Args:
        checkpoints: Their folder.
        damaged: Checkpoint -> what is wrong with it.
        way_out: What the user can do, a sentence.
    """
    lines = "\n".join(f"  {name}: {why}" for name, why in damaged.items())
    return UserError(f"no checkpoint in {checkpoints} can be continued from:\n{lines}\n{way_out}")
