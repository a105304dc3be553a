"""Whether a checkpoint is what was written: its files' sizes, and the hashes of a rank's share of them. Torch-free."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from rlinf_core.errors import UserError
from rlinf_core.training.checkpoint.state import DamageError, FileSum, Position, candidates, read_state


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


def _share(files: Mapping[str, FileSum], rank: int, ranks: int) -> list[str]:
    """Every rank's as many and as large files as another's."""
    by_size = sorted(files, key=lambda name: (-files[name].bytes, name))
    return by_size[rank::ranks] if ranks else []


def newest_whole(folder: Path, checkpoints: Path, damaged: dict[str, str]) -> tuple[Path, Position] | None:
    """The newest checkpoint that a run may continue from and that is not known to be damaged; None: it has none yet.

    Only what costs nothing is looked at: states and sizes.

    Args:
        folder: The run's.
        checkpoints: The folder of its checkpoints.
        damaged: What is wrong with which checkpoint; what is found is added.

    Raises:
        UserError: There are checkpoints, but none that is whole.
    """
    there = candidates(folder, checkpoints)
    for path in there:
        why = damaged.get(path.name) or find_damage(path)
        if not why:
            return path, read_state(path).position
        damaged[path.name] = why
    if there:
        lines = "\n".join(f"  {path.name}: {damaged[path.name]}" for path in there)
        raise UserError(
            f"no checkpoint in {checkpoints} can be continued from:\n{lines}\n"
            f"Restore one, write the name of another one into {folder / 'latest'}, or --overwrite to start afresh."
        )
    return None
