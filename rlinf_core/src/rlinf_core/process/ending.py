"""The end of a training process: one message, `exit.json` in the run's folder, and an exit code (contract 10).

torchrun exits with 1 whatever its workers exit with, so the file contains the promised code. torchrun also ends with a
report of thirty lines, which would scroll the message away: it ends with what the worker wrote to torchelastic's error
file, so the message goes there too. Torch-free.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from rlinf_core.errors import Exit, Interrupted, RunError, UserError, beyond_environment
from rlinf_core.files import write_text
from rlinf_core.process.start import launched_rank
from rlinf_core.process.watchdog import GRACE, catch_stops, kill_children, release_stops, stops_to_catch
from rlinf_core.terminal import wrap
from rlinf_core.untrusted.text import printable

if TYPE_CHECKING:
    from rlinf_core.contract.run import Trainer

EXIT_FILE = "exit.json"
OTHER_RANKS_WAIT = 5.0
"""Seconds that other ranks wait before printing a message, so that rank 0 alone prints what all ranks found."""

ERROR_FILE_VARIABLE = "TORCHELASTIC_ERROR_FILE"
"""Names the file whose message torchrun's report ends with, a new one for each process and each restart."""
QUIET_WAY = "`rlinf launch CONFIG` starts the same run without this report"

SIGNALS_APART = 1.0
"""Seconds within which a signal to all ranks reaches the last of them."""

Reason = Literal["finished", "preempted", "interrupted", "mistake", "defect"]


class Ending:
    """The state of the run that is needed when this process ends."""

    def __init__(self, *, debug: bool = False) -> None:
        self._debug = debug
        """Whether a mistake is shown with its traceback."""
        self.rank = launched_rank()
        self.folder: Path | None = None
        """The run's folder, once this process owns it."""
        self.start_step = 0
        self.trainer: Trainer | None = None

    @property
    def step(self) -> int:
        """Number of finished optimizer steps."""
        return self.trainer.step if self.trainer else self.start_step

    def belongs_to(self, folder: Path, start_step: int) -> None:
        """Set the run's folder and start step, and remove an earlier process's exit file."""
        self.folder, self.start_step = folder, start_step
        if self.rank == 0:
            (folder / EXIT_FILE).unlink(missing_ok=True)

    def follow(self, main: Callable[[Ending], object]) -> int:
        """Run `main` and record how it ended; returns the exit code.

        Raises:
            Exception: A defect, which keeps its traceback; Python then exits with 1.
        """
        before = _mistake_before(restarted=os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0")
        if before is not None:
            _fill_error_file(before)
            return Exit.USER_ERROR
        catch_stops(self._leave)
        try:
            main(self)
        except UserError as error:
            return self._record_mistake(error)
        except RunError as error:
            return self._record_fault(error)
        except KeyboardInterrupt as error:
            # torchrun signals the other ranks once one has failed: then the fault, not the signal, ended the run.
            fault = _fault_before(error)
            return self._record_fault(fault) if fault else self._record_stop(error)
        except BaseException as error:
            if stop := self._stop_on_its_way():
                return self._record_stop(stop)
            if mistake := beyond_environment(error):
                return self._record_mistake(mistake)
            if isinstance(error, SystemExit):  # Of a policy, dataset or library: not how a run ends, whatever its code.
                exited = RuntimeError(f"the run's code called sys.exit({error.code!r}) instead of raising an error")
                exited.__cause__, error = error, exited
            notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
            self._record(Exit.DEFECT, "defect", f"{type(error).__name__}: {error}{notes}")
            _fill_error_file("".join(traceback.format_exception(error)).rstrip())
            raise error
        return self._record(Exit.OK, "finished", "")

    def _record_mistake(self, error: UserError) -> int:
        self._say_once(error)
        if os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
            with suppress(OSError):
                _marker().write_text(_as_reported(error), encoding="utf-8")
        return self._record(Exit.USER_ERROR, "mistake", str(error))

    def _record_fault(self, fault: RunError) -> int:
        self._say_once(fault)
        return self._record(Exit.DEFECT, "defect", str(fault))

    def _leave(self, number: int, _: FrameType | None) -> None:
        """Stop on a signal before there is anything to save; a trainer that can save handles the signal itself."""
        raise Interrupted(signal.Signals(number), self.step)

    def _stop_on_its_way(self) -> KeyboardInterrupt | None:
        """The signal behind a failure, if any: the first rank to stop breaks the other ranks' connections."""
        try:
            time.sleep(SIGNALS_APART)
        except KeyboardInterrupt as stop:
            return stop
        return None

    def _record_stop(self, stop: KeyboardInterrupt) -> int:
        said = str(stop) or f"interrupted after step {self.step}"
        if self.rank == 0 and self.trainer is None:
            _say(said)
        return self._record(*_stopped(stop), said)

    def _say_once(self, error: UserError | RunError) -> None:
        """Print the message once: rank 0 at once, another rank only if rank 0 has not ended the run meanwhile."""
        if self.rank:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # From torchrun once rank 0 has ended: nothing to add.
            time.sleep(OTHER_RANKS_WAIT)
        where = f" on rank {self.rank}" if self.rank else ""
        shown = "".join(traceback.format_exception(error)) if self._debug else ""
        _say(f"{shown}error{where}: {printable(str(error))}")
        _fill_error_file(_as_reported(error))

    def leave_now(self, error: RunError | Interrupted) -> NoReturn:
        """End this process from another thread, as its main thread hangs: say why, write the file, exit."""
        if isinstance(error, RunError):
            _say(f"error: {error}")
            _fill_error_file(_as_reported(error))
            code = self._write(Exit.DEFECT, "defect", str(error))
        else:
            said = (
                f"stopped by {error.received.name} after step {self.step}, which could not be saved in {GRACE:g} s: "
                "the same command continues from the last checkpoint"
            )
            _say(said)
            code = self._write(*_stopped(error), said)
        kill_children()
        os._exit(code)

    def _record(self, code: Exit, reason: Reason, message: str) -> int:
        """Write the file, which no signal may interrupt any more."""
        release_stops(dict.fromkeys(stops_to_catch(), signal.SIG_IGN))
        return self._write(code, reason, message)

    def _write(self, code: Exit, reason: Reason, message: str) -> int:
        """Write the file on rank 0; another rank writes only a mistake or defect, the cause of the others' end."""
        # torchrun ends the other ranks by SIGTERM once one has failed: the first writer knows the cause, and a mistake
        # replaces other reasons.
        try:
            first = self.folder is not None and not (self.folder / EXIT_FILE).exists()
            if self.folder and (reason == "mistake" or (first and (self.rank == 0 or reason == "defect"))):
                end: dict[str, Any] = {"code": int(code), "reason": reason, "message": printable(message)}
                end |= {"step": self.step, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
                write_text(self.folder / EXIT_FILE, json.dumps(end, indent=1) + "\n", writer=f"rank_{self.rank}")
        except OSError as error:  # The disk may be what ended the run; the exit code still counts.
            _say(f"warning: {EXIT_FILE} could not be written to {self.folder}: {error.strerror}")
        return code


def _stopped(stop: KeyboardInterrupt) -> tuple[Exit, Reason]:
    """Exit code and reason: only Ctrl-C interrupts, other signals come from launchers and schedulers."""
    if isinstance(stop, Interrupted) and stop.received != signal.SIGINT:
        return Exit.OK, "preempted"
    return Exit.INTERRUPTED, "interrupted"


def _say(text: str) -> None:
    """Print to stderr; if it is redirected to a full disk, only the text is lost."""
    try:
        print(wrap(text, sys.stderr), file=sys.stderr, flush=True)
    except OSError:
        # Python flushes again at exit, and exits with 120 if that fails.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def _fault_before(error: BaseException) -> RunError | None:
    """The fault that was being handled when this was raised."""
    context = error.__context__
    while context is not None and not isinstance(context, RunError):
        context = context.__context__
    return context


def _as_reported(error: UserError | RunError) -> str:
    """A message as torchrun's report shows it, under the title "traceback"."""
    return f"none, it is not a bug; {QUIET_WAY}\nerror: {printable(str(error))}"


def _fill_error_file(text: str) -> None:
    """Write what torchrun's report ends with, in the format of `torch.distributed.elastic.multiprocessing.errors`."""
    if not (file := os.environ.get(ERROR_FILE_VARIABLE)):
        return
    extra = {"py_callstack": printable(text), "timestamp": str(int(time.time()))}
    message = {"message": printable(text), "extraInfo": extra}
    # Without it the report only lacks the message, which is on stderr and in exit.json as well. A file that is only
    # half there would break the report, hence the renaming.
    with suppress(OSError):
        write_text(Path(file), json.dumps({"message": message}), writer="ending")


def _marker() -> Path:
    """A file that this torchrun's workers on this machine share, as a restart does not fix a mistake."""
    return Path(tempfile.gettempdir()) / f"rlinf-{os.getuid()}-{os.getppid()}.mistake"


def _mistake_before(*, restarted: bool) -> str | None:
    """The mistake after which torchrun has restarted this process, if any; the first start removes stale markers."""
    if not restarted:
        _marker().unlink(missing_ok=True)
        return None
    try:
        return _marker().read_text(encoding="utf-8")
    except OSError:
        return None
