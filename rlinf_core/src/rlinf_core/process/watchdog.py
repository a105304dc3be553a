"""Ends a process that can no longer end itself: one that hangs, does not stop when asked, or has lost its launcher.

Each process has one watchdog, as it has one set of signal handlers. It runs in a thread, from the start of a run to its
end. A thread of the run hangs if it stays at the same place for `trainer.timeout_seconds`; the main thread only if
meanwhile neither the process nor its children compute, read or write: statistics, compilation and downloads may take
hours. A stopped process cannot notice that itself, so each rank also listens to its neighbour. Torch-free.
"""

from __future__ import annotations

import faulthandler
import math
import multiprocessing
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Protocol

from rlinf_core.errors import Interrupted, RunError
from rlinf_core.terminal import announce, warn

FOLDER = "flight"
"""Folder of records in the run's folder."""
GRACE = 25.0
"""Seconds from a signal to the exit: torchrun kills its workers 30 seconds after it forwards one."""
IDLE, BUSY = 1.5, 3.0
"""Times the limit at one place after which a main thread hangs: `IDLE` if nothing works since the limit itself, `BUSY`
in any case in a step after the first (which may compile), as a thread that waits for a GPU is busy. Ranks that wait for
it in a collective end sooner, after the limit."""
SAVING = 3.0
"""Times the limit that a save may take to sync a file: it makes no visible progress meanwhile."""
LEAST_CPU, LEAST_IO = 0.01, 2**16
"""A process works if it uses this share of a core, or reads and writes this many bytes, from one look to the next."""
LOOK = 1.0
"""Most seconds between two looks."""
BEATS = 20
"""Signs of life that a rank gives in the time of the limit."""

Leave = Callable[[RunError | Interrupted], object]
"""Called in the watchdog's thread with the reason; must end the process."""


class KeyValueStore(Protocol):
    """What ranks share: torch's `Store`."""

    def set(self, key: str, value: str, /) -> None:
        """Set a key."""
        ...

    def check(self, keys: list[str], /) -> bool:
        """Whether all keys are set."""
        ...

    def get(self, key: str, /) -> bytes:
        """The value of a key, which is waited for."""
        ...


@dataclass
class _Track:
    """What a thread is doing."""

    place: str
    step: int | None = None
    since: float = field(default_factory=time.monotonic)
    waits: bool = False
    """Whether it waits for another rank, which has a watchdog of its own."""
    is_main: bool = False
    first_step: int | None = None

    def __str__(self) -> str:
        return self.place if self.step is None else f"step {self.step}, {self.place}"

    def most(self, limit: float) -> float:
        """Seconds after which it hangs however busy the process is."""
        if not self.is_main:
            return SAVING * limit
        return BUSY * limit if self.step is not None and self.step != self.first_step else math.inf


class Watchdog:
    """See the module."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self.folder: Path | None = None
        """Where records of a hang are written: the run's folder, once this process owns it."""
        self._limit, self._rank = math.inf, 0
        self._tracks: dict[int, _Track] = {}
        self._leave: Leave | None = None
        self._asked: signal.Signals | None = None
        self._deadline = math.inf
        self._work: tuple[float, float, int] = (0.0, 0.0, 0)
        self._idle_since = math.inf
        self._other, self._heard_at = 0, math.inf

    # What threads report.

    def enter(self, place: str, step: int | None = None) -> None:
        """Set what this thread does next."""
        if track := self._tracks.get(threading.get_ident()):
            track.place, track.step, track.waits = place, step, False
            track.first_step = step if track.first_step is None else track.first_step
            track.since = time.monotonic()

    def progress(self) -> None:
        """Report that this thread has done a part of its work, such as writing some bytes."""
        if track := self._tracks.get(threading.get_ident()):
            track.since = time.monotonic()

    @contextmanager
    def waiting(self, waits: bool = True) -> Iterator[None]:
        """The body waits, as long as they need, for other ranks or threads, which are watched themselves.

        Args:
            waits: False for a part of such a body that works.
        """
        track = self._tracks.get(threading.get_ident())
        if track is None:
            yield
            return
        before, track.waits, track.since = track.waits, waits, time.monotonic()
        try:
            yield
        finally:
            track.waits, track.since = before, time.monotonic()

    @contextmanager
    def thread(self, place: str) -> Iterator[None]:
        """Watch this thread, besides the main one, while the body runs; it reports its `progress`."""
        self._tracks[threading.get_ident()] = _Track(place)
        try:
            yield
        finally:
            self._tracks.pop(threading.get_ident(), None)

    # The run.

    @contextmanager
    def watching(self, leave: Leave, *, rank: int = 0) -> Iterator[None]:
        """Watch this process while the body runs. Called in the main thread.

        Args:
            leave: Ends the process.
            rank: This process, for messages.
        """
        self._reset()
        self._leave, self._rank = leave, rank
        self._tracks[threading.get_ident()] = _Track("the start", is_main=True)
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        # Python runs a signal's handler between two bytecodes: never, while a call into a library does not return.
        before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        over = threading.Event()
        thread = threading.Thread(target=self._watch, args=(reading, over), name="watchdog", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            os.write(writing, b"\0")
            thread.join()
            signal.set_wakeup_fd(before)
            self._tracks.clear()
            self._leave = None
            os.close(reading)
            os.close(writing)

    def allow(self, seconds: float) -> None:
        """Set the limit, `trainer.timeout_seconds`; until then, nothing counts as hanging."""
        self._limit = seconds

    def listen(self, store: KeyValueStore, rank: int, size: int) -> None:
        """Give signs of life, and end this process if the rank before this one gives none."""
        if size > 1 and self._leave is not None:
            arguments = (store, rank, (rank - 1) % size, self._leave)
            threading.Thread(target=self._listen, args=arguments, name="signs of life", daemon=True).start()

    def _watch(self, signals: int, over: threading.Event) -> None:
        began_by = launcher()
        while True:
            ready, _, _ = select.select([signals], [], [], self._pause())
            if over.is_set():
                return
            if ready:
                self._note(os.read(signals, 64))
            if began_by and os.getppid() != began_by and self._asked is None:
                warn(f"rank {self._rank}: the process that started this one is gone, so the run saves and ends")
                self._note(bytes([signal.SIGTERM]))
                os.kill(os.getpid(), signal.SIGTERM)
            if error := self._too_late() or self._hang():
                assert self._leave is not None
                self._leave(error)
                return

    def _pause(self) -> float:
        return max(min(LOOK, self._limit / 40, self._deadline - time.monotonic()), 0.0)

    def _note(self, received: bytes) -> None:
        """Start the grace period at the first signal that asks the run to stop."""
        asking = [number for number in received if callable(_caught.get(number))]
        if asking and self._asked is None:
            self._asked, self._deadline = signal.Signals(asking[0]), time.monotonic() + GRACE

    def _too_late(self) -> Interrupted | None:
        if self._asked is None or time.monotonic() < self._deadline:
            return None
        return Interrupted(self._asked, -1)

    def _hang(self) -> RunError | None:
        now = time.monotonic()
        for track in list(self._tracks.values()):
            seconds = now - track.since
            if track.waits or seconds < self._limit:
                continue
            hangs = (track.is_main and self._is_idle()) or seconds > track.most(self._limit)
            if hangs and not _is_debugged():
                # It may be waiting for the rank that is silent, which has been so for a little less than `IDLE`.
                return self._silence(self._limit) or self._explain(str(track), seconds)
        return None

    def _is_idle(self) -> bool:
        """Whether the process and its children have not worked for a while; called with every look after the limit."""
        now, (before, cpu, io) = time.monotonic(), self._work
        self._work = (now, *work())
        worked = self._work[1] - cpu > LEAST_CPU * (now - before) or self._work[2] - io > LEAST_IO
        if worked or now - before > 2 * LOOK:  # There was no reason to look until now.
            self._idle_since = now
        return now - self._idle_since > (IDLE - 1) * self._limit

    def _explain(self, place: str, seconds: float) -> RunError:
        head = f"rank {self._rank}, process {os.getpid()}, {place}: hangs, for {seconds:.0f} s"
        record = ""
        if self.folder is not None:
            with suppress(OSError):
                record = f"; its stack is in {write_record(self.folder / FOLDER, self._rank, head)}"
        return RunError(
            f"rank {self._rank} hangs ({place}): nothing happened for {seconds:.0f} s (trainer.timeout_seconds = "
            f"{self._limit:g}){_halted()}{record}. The same command continues from the last checkpoint"
        )

    def _listen(self, store: KeyValueStore, rank: int, other: int, leave: Leave) -> None:
        heard, number, self._other = "", 0, other
        while self._leave is leave:
            try:
                store.set(f"alive/{rank}", str(number := number + 1))
                now = store.get(f"alive/{other}").decode() if store.check([f"alive/{other}"]) else ""
            except Exception:  # The store's host has ended; the collectives that wait for it report that.
                self._heard_at = math.inf
                return
            if now != heard:
                heard, self._heard_at = now, time.monotonic()
            elif (error := self._silence(IDLE * self._limit)) and self._leave is leave:
                leave(error)
            time.sleep(min(self._limit / BEATS, 30.0))

    def _silence(self, limit: float) -> RunError | None:
        """What to say if the rank before this one has given no sign of life for more than `limit` seconds."""
        seconds = time.monotonic() - self._heard_at
        if seconds <= limit:
            return None
        return RunError(
            f"rank {self._other} has given no sign of life for {seconds:.0f} s (trainer.timeout_seconds = "
            f"{self._limit:g}): its process is stopped, or its machine is gone. The same command continues from the "
            "last checkpoint"
        )


STOPPING = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGXCPU")
    if hasattr(signal, name)
)
"""The signals that ask a run to save and end: of terminals, launchers, schedulers, cloud machines and time limits."""


Handler = Callable[[int, FrameType | None], object] | int | signal.Handlers | None
_caught: dict[int, Handler] = {}
"""What we have set, which may be to ignore them."""


def stops_to_catch() -> list[int]:
    """Those of `STOPPING` that this process may handle: not those that other code has taken, nor a SIGHUP that `nohup`
    ignores. Shells ignore SIGINT and SIGQUIT for what they start in the background, where signals still ask to stop.
    """
    return [number for number in STOPPING if _is_free(number)]


def _is_free(number: int) -> bool:
    now = signal.getsignal(number)
    ignored = now == signal.SIG_IGN and number != signal.SIGHUP
    return ignored or now in (signal.SIG_DFL, signal.default_int_handler) or now == _caught.get(number)


def catch_stops(handler: Callable[[int, FrameType | None], object]) -> dict[int, Handler]:
    """Handle the signals that ask a run to stop; returns the previous handlers, for `release_stops`."""
    before: dict[int, Handler] = {number: signal.getsignal(number) for number in stops_to_catch()}
    release_stops(dict.fromkeys(before, handler))
    return before


def release_stops(handlers: Mapping[int, Handler]) -> None:
    """Set handlers of signals that ask a run to stop."""
    for number, handler in handlers.items():
        signal.signal(number, handler)
        _caught[number] = handler


def launcher() -> int:
    """The process that started this one, if that is torchrun; 0 otherwise: a shell may end before what it started."""
    parent = os.getppid()
    return parent if "TORCHELASTIC_RUN_ID" in os.environ and parent > 1 else 0


def is_orphan(pid: int, began_by: int) -> bool:
    """Whether a process of this machine has lost its `launcher`; False if that is not known."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return began_by > 0 and int(fields[1]) != began_by
    except (OSError, ValueError, IndexError):
        return False


def record_file(folder: Path, rank: int) -> Path:
    """The file of a rank's records."""
    return folder / f"rank_{rank:05d}.txt"


def write_record(folder: Path, rank: int, head: str) -> Path:
    """Append the stacks of all threads to a rank's records, under a heading; returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = record_file(folder, rank)
    with path.open("a", encoding="utf-8") as file:
        file.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {head}\n")
        file.flush()
        faulthandler.dump_traceback(file, all_threads=True)
        file.write("\n")
    return path


def kill_children() -> None:
    """Kill daemonic children, such as the loader's workers: Python waits for them, in vain if one is stopped.

    Others are left alone: a plugin may have started one that finishes its work after the run.
    """
    for child in multiprocessing.active_children():
        if child.daemon:
            with suppress(OSError):
                child.kill()


def work() -> tuple[float, int]:
    """CPU seconds of this process, without this thread, and of its children; bytes that it has read and written."""
    cpu, io = time.process_time() - time.thread_time(), 0
    for pid in _descendants():
        with suppress(OSError, ValueError, IndexError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            cpu += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    with suppress(OSError, ValueError):
        lines = Path("/proc/self/io").read_text().splitlines()
        io = sum(int(line.split()[1]) for line in lines if line.startswith(("rchar", "wchar")))
    return cpu, io


def _descendants() -> Iterator[int]:
    """The processes below this one, where Linux lists them."""
    waiting = [os.getpid()]
    while waiting:
        children = list(_children_of(waiting.pop()))
        waiting += children
        yield from children


def _children_of(pid: int) -> Iterator[int]:
    with suppress(OSError, ValueError):
        for task in os.listdir(f"/proc/{pid}/task"):
            yield from map(int, Path(f"/proc/{pid}/task/{task}/children").read_text().split())


def _halted() -> str:
    """Which children are stopped or wait for storage, as a part of a message."""
    found = []
    for pid in _descendants():
        with suppress(OSError, IndexError):
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            if state in "Tt":
                found.append(f"the child process {pid} is stopped")
            elif state == "D":
                found.append(f"the child process {pid} waits for storage")
    return "".join(f"; {one}" for one in found[:4])


def _is_debugged() -> bool:
    """Whether the main thread is in a debugger."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None:
        if frame.f_globals.get("__name__", "").partition(".")[0] in ("bdb", "pdb", "pydevd", "debugpy"):
            return True
        frame = frame.f_back
    return False


watchdog = Watchdog()
"""The watchdog of this process."""


def enter(place: str, rank: int) -> None:
    """Set what the main thread does next that may take a while, and print it on rank 0."""
    watchdog.enter(place)
    announce(place, rank=rank)
