"""What a tracker's process is started with, and what it remembers in `<run>/trackers/` for a resumed run.

It remembers the tracker's own name of the run and the last row that it has logged. A resumed run repeats the steps
since its checkpoint; as their randomness belongs to the samples, they are the same steps again, and trackers that
cannot replace a step get each only once.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from rlinf_core import UserError
from rlinf_core.untrusted.text import parse_json, read_json

FOLDER = "trackers"
"""The folder of what trackers remember, in that of the run."""
MOST_ROWS = 999_999
"""More rows than any step has."""
SECONDS_TO_LOCK = 60.0
"""How long to wait for the tracker of an earlier process of the run, which may still be uploading."""


@dataclass(frozen=True)
class Job:
    """What a tracker's process is to log."""

    type: str
    """Type of the logger."""
    settings: dict[str, Any]
    """Its table."""
    folder: str
    """The run's folder."""
    name: str
    """The run's name."""
    start_step: int
    """Finished steps when the run's process started."""

    def to_json(self) -> bytes:
        """One line."""
        return json.dumps(asdict(self)).encode() + b"\n"

    @classmethod
    def parse(cls, line: bytes) -> Job:
        """The job of a line."""
        return cls(**parse_json(line))


@dataclass(frozen=True, order=True)
class Mark:
    """The last row that was logged: its step, how many rows of that step, and the last step whose files were."""

    step: int = 0
    rows: int = 0
    files: int = -2
    """-2: not even what is there from the beginning."""

    def to_bytes(self) -> bytes:
        """Always of the same length, so that it is replaced in one write."""
        return f"{self.step:020d} {self.rows:06d} {self.files:020d}\n".encode()


class Memory:
    """The files of a tracker in the run's folder; locked while its process lives."""

    def __init__(self, job: Job) -> None:
        """Lock the files, and read them.

        Raises:
            UserError: The process of an earlier run still uses them.
        """
        self._folder = Path(job.folder) / FOLDER
        self._folder.mkdir(parents=True, exist_ok=True)
        self._known, self._marked = (self._folder / f"{job.type}{suffix}" for suffix in (".json", ".mark"))
        self._lock = _locked(self._folder / f"{job.type}.lock")
        self.id, self.mark = "", Mark()
        if job.start_step:
            self.id, self.mark = _read_id(self._known), _read_mark(self._marked)
        self.continues = bool(self.id)
        """Whether the tracker has a run of this run."""
        self.id = self.id or uuid.uuid4().hex
        self._marks = os.open(self._marked, os.O_RDWR | os.O_CREAT, 0o644)

    def forget(self) -> None:
        """Begin a new run of the tracker, with all steps."""
        self.id, self.mark, self.continues = uuid.uuid4().hex, Mark(), False

    def rewind(self, step: int) -> None:
        """Log steps after this one again."""
        if self.mark.step > step:
            self.mark = Mark(step, MOST_ROWS, min(self.mark.files, step))

    def save(self, settings: dict[str, Any]) -> None:
        """Write down the tracker's run, which is open now."""
        aside = self._known.with_suffix(".tmp")
        aside.write_text(json.dumps({"id": self.id, "settings": settings}) + "\n", encoding="utf-8")
        aside.replace(self._known)
        self.set(self.mark)

    def set(self, mark: Mark) -> None:
        """Remember a row before it is logged: after a crash it may be missing, but is never there twice."""
        self.mark = mark
        os.pwrite(self._marks, mark.to_bytes(), 0)


def saved_settings(folder: Path, type: str) -> dict[str, Any]:
    """The settings with which a tracker was used last; empty if it was not."""
    try:
        settings = read_json(folder / FOLDER / f"{type}.json")["settings"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return settings if isinstance(settings, dict) else {}


def _locked(path: Path) -> IO[str]:
    file, until = path.open("a"), time.monotonic() + SECONDS_TO_LOCK
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError as error:
            if time.monotonic() > until:
                raise UserError(
                    f"another process still logs this run ({path} is locked): wait for it, or end it"
                ) from error
            time.sleep(0.2)
        except OSError:  # The file system has no locks.
            return file


def _read_id(path: Path) -> str:
    try:
        found = read_json(path)["id"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return found if isinstance(found, str) else ""


def _read_mark(path: Path) -> Mark:
    try:
        return Mark(*map(int, path.read_text(encoding="ascii").split()))
    except (OSError, ValueError, TypeError):
        return Mark()
