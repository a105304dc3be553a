"""`state.json`: a checkpoint's position in its run and its files; damaged checkpoints, and the newest intact one.

Torch-free. The file is written when the rest of the checkpoint is on disk: a folder without a readable one is not a
checkpoint. In reading order: `Position` and `State`, writing and reading them, the names of checkpoints, and the checks
that find damage and choose the checkpoint to continue from.
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
"""A glob pattern that matches the names of checkpoints and no other folder."""


class DamageError(UserError):
    """A checkpoint is damaged; the message says how, without naming the checkpoint."""


@dataclass(frozen=True)
class Position:
    """The position of a checkpoint in its run."""

    step: int
    """Finished optimizer steps."""
    epoch: int
    """Complete passes over the data."""
    sample: int
    """Samples of the current epoch consumed so far, over all ranks."""
    rows: int
    """Rows of the training split, on which the order of samples depends."""
    seed: int
    """The run's seed; with epoch and sample it determines every further draw."""
    layout: str
    """Hash of parameter names and shapes."""
    validated: int = 0
    """The step of the last validation."""
    best: Best = NO_BEST
    """The best validation so far."""
    data: str = ""
    """Fingerprint of the rows; empty if the statistics record it (`data.statistics.run`)."""
    data_layout: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """The run's `PolicyConfig.data_layout`."""
    adapters: Mapping[str, int] = field(default_factory=dict)
    """Class of adapters that plugins have added to the policy -> number of parameters that they hold."""
    format: int = FORMAT

    def other_layout(self, now: Position) -> str:
        """The differences between the data layouts of this position and of `now`; empty if they are equal."""
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
    """Size and hash of a checkpoint's file when it was written."""

    bytes: int
    """Its size."""
    sha256: str
    """Its SHA-256, hexadecimal."""


@dataclass(frozen=True)
class State:
    """The content of `state.json`."""

    position: Position
    """The run's position."""
    files: Mapping[str, FileDigest]
    """All other files of the checkpoint, by name."""


def dump_state(state: State) -> str:
    """The text of `state.json`, which ends with a hash of itself."""
    table = asdict(state.position) | {"files": {name: asdict(state.files[name]) for name in sorted(state.files)}}
    return json.dumps(table | {"sha256": _own_hash(table)}, indent=1)


def _own_hash(table: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()


def read_state(path: Path) -> State:
    """Read the `state.json` of a checkpoint.

    Raises:
        DamageError: It is missing, or its hash does not match.
        UserError: Another version of this package wrote it.
    """
    try:
        table = json.loads((path / STATE).read_text(encoding="utf-8"))
        form = table["format"]
        if isinstance(form, int) and form != FORMAT:
            raise UserError(f"{path} has checkpoint format {form}; this version reads {FORMAT}.")
        if table.pop("sha256") != _own_hash(table):
            raise DamageError(f"the text of {STATE} does not match its hash")
        files = {_plain(name): FileDigest(**entry) for name, entry in table.pop("files").items()}
        return State(Position(**table | {"best": Best(**table["best"])}), files)
    except FileNotFoundError as error:
        missing = f"it has no {STATE}: it was never completed" if path.is_dir() else "it does not exist"
        raise DamageError(missing) from error
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DamageError(f"{STATE} cannot be read ({type(error).__name__}: {error})") from error


def _plain(name: str) -> str:
    """The name, if it is that of a file directly in the checkpoint's folder; raises `ValueError` otherwise."""
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


def statistics_name(file: str) -> str:
    """The name in a checkpoint of a copy of the run's statistics.

    Args:
        file: Path of the statistics relative to the run's folder, `RunSource.statistics`.
    """
    return file.replace("/", ".")


def statistics_copy(path: Path, file: str) -> Path | None:
    """The copy of the run's statistics in a checkpoint; None if an early version saved it, or the run has none.

    Args:
        path: The checkpoint.
        file: See `statistics_name`.

    Raises:
        DamageError: `state.json` cannot be read.
    """
    name = statistics_name(file)
    return path / name if name in read_state(path).files else None


def step_name(step: int) -> str:
    """The name of a checkpoint's folder; names sort like steps."""
    return f"step_{step:09d}"


def candidates(folder: Path, checkpoints: Path) -> list[Path]:
    """The checkpoints that a run may continue from, newest first.

    What is there decides. If `latest` names a checkpoint that exists, somebody may have gone back to it, and later ones
    do not count. A `latest` that is missing, damaged, or names what does not exist rules nothing out.

    Args:
        folder: The run's folder.
        checkpoints: The checkpoint folder.
    """
    names = {path.name for path in checkpoints.glob(NAMES)}
    if named := latest_name(folder):
        names = {name for name in names if name <= named} if named in names else names | {named}
    return [checkpoints / name for name in sorted(names, reverse=True)]


def latest_name(folder: Path) -> str:
    """The checkpoint that the run's file `latest` names, whether it exists or not; empty if it names none."""
    pointer = folder / "latest"
    named = pointer.read_text(encoding="utf-8", errors="replace").strip() if pointer.exists() else ""
    return named if Path(named).name == named and named.startswith("step_") else ""


def find_damage(path: Path, *, rank: int = 0, ranks: int = 0) -> str:
    """The damage of a checkpoint, as text; empty if there is none.

    Args:
        path: The checkpoint.
        rank: The rank whose share of the files is hashed.
        ranks: Number of ranks that share the files; 0: hash none, compare only sizes.

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
                    return f"the content of {name} has changed since it was written (sha256)"
    except DamageError as error:
        return str(error)
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        return f"{error.strerror}: {error.filename}"
    return ""


def _share(files: Mapping[str, FileDigest], rank: int, ranks: int) -> list[str]:
    """The files that this rank hashes: every rank gets about as many bytes."""
    by_size = sorted(files, key=lambda name: (-files[name].bytes, name))
    return by_size[rank::ranks] if ranks else []


def newest_whole(paths: Sequence[Path], damaged: dict[str, str]) -> tuple[Path, Position] | None:
    """The newest checkpoint with no known damage; None if there is none.

    Checks only what is cheap: `state.json` and file sizes.

    Args:
        paths: Checkpoints, newest first (`candidates`).
        damaged: Checkpoint name -> its damage; what is found is added.

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
    """The error if every checkpoint is damaged.

    Args:
        checkpoints: The checkpoint folder.
        damaged: Checkpoint name -> its damage.
        way_out: What the user can do, as a sentence.
    """
    lines = "\n".join(f"  {name}: {why}" for name, why in damaged.items())
    return UserError(f"no checkpoint in {checkpoints} can be continued from:\n{lines}\n{way_out}")
