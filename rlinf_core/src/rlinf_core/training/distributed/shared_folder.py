"""Require that all ranks see one folder, because all of them write their shards of a checkpoint into it. Torch-free.

Rank 0 writes a token, a file with a new random name and content, and every rank has to read it under its own path of
the folder. One process of each machine then creates and removes a file beside it.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rlinf_core.contract.process_group import ProcessGroup
from rlinf_core.contract.run import RunConfig
from rlinf_core.errors import UserError
from rlinf_core.files import find_obstacle, write_text, writing
from rlinf_core.shared_files import has_text, lag, name_process, wait_until_seen

LISTED = 4
"""An error lists at most this many processes."""


@dataclass(frozen=True)
class Token:
    """A file that rank 0 has written."""

    setting: str
    """The setting that names the folder: `runner.output_dir` or `runner.checkpoint_dir`."""
    inside: bool
    """Whether it is in the folder itself, and not beside it."""
    name: str
    text: str

    def path(self, run: RunConfig) -> Path:
        """Where a rank with this config has to find it."""
        folder = (run.folder if self.setting == "runner.output_dir" else run.checkpoints).absolute()
        return (folder if self.inside else folder.parent) / self.name


def check_shared_folders(run: RunConfig, group: ProcessGroup) -> None:
    """Raise `UserError` on every rank if some rank does not see the run's folder or its checkpoint folder, or cannot
    write there; one rank alone checks nothing.

    Called while the run's folder is locked.
    """
    if group.size == 1:
        return
    tokens = group.decide(lambda: list(_write_tokens(run)))
    try:
        for token in tokens:
            _check(run, group, token)
    finally:
        if group.rank == 0:
            for token in tokens:
                with suppress(OSError):
                    token.path(run).unlink(missing_ok=True)


def _write_tokens(run: RunConfig) -> Iterator[Token]:
    """The run's folder gets a token only if it holds a run, so that one that is left never makes it look occupied."""
    places = [("runner.output_dir", (run.folder / "config.toml").exists())]
    if run.runner.checkpoint_dir and not find_obstacle(run.checkpoints):
        places.append(("runner.checkpoint_dir", run.checkpoints.is_dir()))
    for setting, inside in places:
        token = Token(setting, inside, f".{run.folder.name}.token.{uuid.uuid4().hex}", uuid.uuid4().hex)
        path = token.path(run)
        with writing(path.parent, f"Name another {setting}"):
            path.parent.mkdir(parents=True, exist_ok=True)
            if setting == "runner.output_dir":  # What a killed start has left is not in use: that folder is locked.
                for left in path.parent.iterdir():
                    if left.name.startswith(f".{run.folder.name}.token."):
                        left.unlink(missing_ok=True)
            write_text(path, token.text)
        yield token


def _check(run: RunConfig, group: ProcessGroup, token: Token) -> None:
    path = token.path(run)
    seen = wait_until_seen(lambda: has_text(path, token.text), path.parent)
    if seen:
        limit = lag(path.parent)
        seen = f"finds no such file in {path.parent}" + (f" within {limit:g} s" if limit else "") + _why(seen)
    elif os.environ.get("LOCAL_RANK", "0") == "0" and (obstacle := _try_to_write(path, group.rank)):
        seen = f"cannot write to {path.parent}: {obstacle}"
    answers = group.gather((name_process(group.rank), str(path.parent), seen))
    wrong = [f"{name} {what}" for name, _, what in answers if what]
    if wrong:
        first, folder, _ = answers[0]
        more = f"; and {len(wrong) - LISTED} more ranks" if len(wrong) > LISTED else ""
        raise UserError(
            f"{token.setting}: the ranks do not share one folder. {first} has written the file {token.name} to "
            f"{folder}, but {'; '.join(wrong[:LISTED])}{more}. Every rank writes its part of a checkpoint there, so "
            f"what these ranks save would be lost. Set {token.setting} to a folder on storage that all machines share "
            "and can write to (on each machine, it may be mounted at another path), or train on one machine"
        )


def _why(seen: str) -> str:
    return "" if seen == "there is no such file" else f" ({seen})"


def _try_to_write(token: Path, rank: int) -> str:
    """Why this machine cannot create a file next to the token; empty: it can."""
    own = token.with_name(f"{token.name}.{rank}")
    try:
        own.touch(exist_ok=False)
        own.unlink()
    except OSError as error:
        return error.strerror or str(error)
    return ""
