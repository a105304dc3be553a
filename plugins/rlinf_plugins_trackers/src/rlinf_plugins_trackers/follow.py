"""The process of a tracker: reads a run's folder while the run writes it, and logs what is new.

`python -m rlinf_plugins_trackers.follow` gets a `Job` as the first line of its standard input, and a line with
`{"failed": ...}` when the run has ended; the end of input without that means that the run's process has died. It
answers on standard output with a JSON object when the tracker is open, and one at the end. What libraries print goes
into `<run>/trackers/<type>.log`.
"""

from __future__ import annotations

import itertools
import json
import os
import select
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, Protocol

from rlinf_core import UserError
from rlinf_core.results import (
    ACTIONS,
    IMAGES,
    TABLE,
    TEXTS,
    VIDEOS,
    EvaluationFiles,
    ResultTable,
    evaluations_of,
    first_batch_of,
    read_action_errors,
    read_table,
)
from rlinf_core.untrusted.text import parse_json
from rlinf_plugins_trackers.config import TRACKERS, TrackerConfig
from rlinf_plugins_trackers.memory import FOLDER, Job, Mark, Memory

METRICS = "metrics.jsonl"
SECONDS_BETWEEN_LOOKS = 1.0
"""How often the run's folder is read."""
ROWS_AT_A_TIME = 1000
"""Rows between two looks at whether the run has ended."""
BEFORE_ALL = Mark().files
LONGEST_TEXT = 100_000
"""Characters of a text that are logged."""


class Sink(Protocol):
    """A run of a tracker."""

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Log metrics of a step. Steps never decrease."""
        ...

    def image(self, step: int, name: str, content: bytes) -> None:
        """Log an image: PNG, JPEG, GIF or WebP."""
        ...

    def video(self, step: int, name: str, path: Path) -> None:
        """Log a video: MP4 or WebM."""
        ...

    def table(self, step: int, name: str, table: ResultTable) -> None:
        """Log a table."""
        ...

    def text(self, step: int, name: str, text: str) -> None:
        """Log a text in Markdown."""
        ...

    def flush(self) -> None:
        """Hand over what is buffered."""
        ...

    def finish(self, *, failed: bool) -> None:
        """End the run."""
        ...


class Follower:
    """Logs what is new in a run's folder, in the order of steps."""

    def __init__(self, folder: Path, memory: Memory, sink: Sink) -> None:
        self._folder, self._memory, self._sink = folder, memory, sink
        self._file: IO[bytes] | None = None
        self._partial = b""
        self._step, self._rows = 0, 0
        """The last row that was read, as in a `Mark`."""

    def begin(self) -> None:
        """Log what is there from the beginning: config, environment, images of the first batch."""
        if self._memory.mark.files > BEFORE_ALL:
            return
        self._memory.set(replace(self._memory.mark, files=BEFORE_ALL + 1))
        for name in ("config.toml", "environment.json"):
            path = self._folder / name
            if path.is_file():
                text = path.read_text(encoding="utf-8", errors="replace")[:LONGEST_TEXT]
                self._sink.text(0, path.stem, f"```{path.suffix[1:]}\n{text}\n```")
        for path in first_batch_of(self._folder):
            self._sink.image(0, f"first_batch/{path.stem}", path.read_bytes())

    def follow(self, *, ended: bool = False) -> bool:
        """Log new rows and files; returns whether there may be more rows.

        Args:
            ended: The run writes nothing any more, so that the files of the last step are complete, too.
        """
        rows = list(itertools.islice(self._new_rows(), ROWS_AT_A_TIME))
        # A step's files are complete when a row of a later step is there: look for files after reading rows.
        evaluations = list(evaluations_of(self._folder)) if rows or ended else []
        for step, values in rows:
            if step > self._step:
                self._log_files(evaluations, before=step)
                self._step, self._rows = step, 0
            self._rows += 1
            mark = self._memory.mark
            if (step, self._rows) > (mark.step, mark.rows):
                self._memory.set(Mark(step, self._rows, mark.files))
                self._sink.metrics(step, values)
        more = len(rows) == ROWS_AT_A_TIME
        if ended and not more:
            self._log_files(evaluations, before=self._step + 1)
        if rows:
            self._sink.flush()
        return more

    def _new_rows(self) -> Iterator[tuple[int, dict[str, float]]]:
        """Complete rows that the run has appended; NaN and infinity are null in the file."""
        if self._file is None:
            try:
                self._file = (self._folder / METRICS).open("rb")
            except FileNotFoundError:
                return
        while line := self._file.readline():
            if not line.endswith(b"\n"):
                self._partial += line
                return
            line, self._partial = self._partial + line, b""
            try:
                row = parse_json(line)
                step = int(row.pop("step"))
                yield step, {name: float("nan") if one is None else float(one) for name, one in row.items()}
            except (ValueError, TypeError, KeyError, AttributeError):
                continue  # No row; the run has reported it.

    def _log_files(self, evaluations: Sequence[EvaluationFiles], *, before: int) -> None:
        """Log the files of evaluations of steps that are over, except those that were logged before."""
        new = [one for one in evaluations if self._memory.mark.files < one.step < before]
        if new:
            self._memory.set(replace(self._memory.mark, files=before - 1))
        for evaluation in new:
            for name, path in evaluation.files.items():
                log_file(self._sink, max(self._step, evaluation.step), evaluation, name, path)


def log_file(sink: Sink, step: int, evaluation: EvaluationFiles, name: str, path: Path) -> None:
    """Log a file of an evaluation as what its name says; one that cannot be read costs only itself."""
    of = f"{'ema_' * evaluation.ema}{evaluation.evaluator}"
    short = f"{of}/{name.removesuffix(TABLE).removesuffix(ACTIONS).removesuffix(path.suffix)}"
    try:
        if name.endswith(TABLE):
            sink.table(step, short, read_table(path))
        elif name.endswith(ACTIONS):
            _log_actions(sink, step, short, path)
        elif path.suffix.lower() in IMAGES:
            sink.image(step, short, path.read_bytes())
        elif path.suffix.lower() in VIDEOS:
            sink.video(step, short, path)
        elif path.suffix.lower() in TEXTS:
            sink.text(step, short, path.read_text(encoding="utf-8", errors="replace")[:LONGEST_TEXT])
    except (UserError, OSError, ValueError) as error:
        print(f"{path} is not logged: {error}", file=sys.stderr, flush=True)


def _log_actions(sink: Sink, step: int, name: str, path: Path) -> None:
    from rlinf_core.plots.actions import plot_error_map, plot_predictions

    errors = read_action_errors(path)
    if errors.chunks:
        sink.image(step, f"{name}/predicted_actions", plot_predictions("predictions", errors).png)
    sink.image(step, f"{name}/action_errors", plot_error_map("errors", {"": errors}).png)


def open_sink(config: TrackerConfig, job: Job, memory: Memory) -> Sink:
    """Open the tracker's run."""
    from importlib import import_module

    module = import_module(f"rlinf_plugins_trackers.sinks.{config.type}_sink")
    sink: Sink = module.open_sink(config, job, memory)
    return sink


def main() -> int:
    """Follow a run until it has ended."""
    commands, answers = _detach()
    job = Job.parse(_read_line(commands))
    folder = Path(job.folder)
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    _print_into(folder / FOLDER / f"{job.type}.log")
    try:
        config = TRACKERS[job.type].model_validate(job.settings)
        memory = Memory(job)
        if config.restarts:
            memory.rewind(job.start_step)
        elif not config.keeps_its_run:
            memory.forget()
        sink = open_sink(config, job, memory)
        memory.save(job.settings)
        _answer(answers, {"open": True})
        _follow(commands, Follower(folder, memory, sink), sink, config.close_timeout)
        _answer(answers, {"finished": True})
    except (Exception, SystemExit) as error:
        import traceback

        traceback.print_exc()
        text = str(error).strip().splitlines()
        name = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        _answer(answers, {"error": f"{name}{text[0] if text else 'no reason given'}"})
        return 1
    return 0


def _follow(commands: int, follower: Follower, sink: Sink, close_timeout: float) -> None:
    follower.begin()
    failed: bool | None = None
    while failed is None:
        more = follower.follow()
        ready, _, _ = select.select([commands], [], [], 0.0 if more else SECONDS_BETWEEN_LOOKS)
        if ready:
            line = _read_line(commands)
            failed = bool(parse_json(line)["failed"]) if line else True
    # A tracker that hangs now is left after this time, even if the run's process does not wait for it.
    last = threading.Timer(close_timeout, _end_at_once)
    last.daemon = True
    last.start()
    while follower.follow(ended=True):
        pass
    sink.finish(failed=failed)
    last.cancel()


def _end_at_once() -> None:
    os.killpg(0, signal.SIGKILL)


def _detach() -> tuple[int, int]:
    """The channels to the run's process; libraries that read or print do not meet them."""
    commands, answers = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    return commands, answers


def _print_into(path: Path) -> None:
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)


def _read_line(descriptor: int) -> bytes:
    line = b""
    while not line.endswith(b"\n") and (read := os.read(descriptor, 1)):
        line += read
    return line if line.endswith(b"\n") else b""


def _answer(descriptor: int, answer: dict[str, Any]) -> None:
    with suppress(OSError):  # The run's process has died.
        os.write(descriptor, json.dumps(answer).encode() + b"\n")


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # Libraries may wait at a normal exit.
