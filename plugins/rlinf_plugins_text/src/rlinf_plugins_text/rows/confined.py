"""A process with limits for code that outside files decide: a model's tokenizer and chat template.

The library that reads `tokenizer.json` ends its process where memory is short, a regular expression in it may take
years, and a chat template is a program. Here that is one message: the process may use a certain memory more than it
has, and its parent ends it when time is up. It is started with the first request and again after it has ended.

Both ends exchange frames: two lengths of eight bytes, JSON, and bytes. Imports no torch.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import resource
import select
import signal
import struct
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import IO, Any, NoReturn

from rlinf_core import UserError

SECONDS = 60.0
"""How long a request may take, and ..."""
SECONDS_PER_CHARACTER = 1e-5
"""... how much longer for each character of its texts: a tenth of the speed of a slow tokenizer on a slow machine."""
THREADS = "MALLOC_ARENA_MAX"
"""glibc's variable: its arenas, one per thread, reserve address space, which is what the limit counts."""
ARENAS = 8
GIB = 2**30
_LENGTHS = struct.Struct("<QQ")
_START = """\
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from rlinf_plugins_text.rows.model_files import main
main()
"""


class LimitError(UserError):
    """A request took more time or memory than it may, or has crashed its process."""


@dataclass(frozen=True)
class Limits:
    """What a request may take.

    Args:
        what: The start of messages: what is computed, and from which file.
        way_out: The end of messages.
        memory: Bytes beyond what the process has.
        characters: Of the texts that are worked on.
    """

    what: str
    way_out: str
    memory: int
    characters: int = 0

    @property
    def seconds(self) -> float:
        """See `SECONDS`."""
        return SECONDS + SECONDS_PER_CHARACTER * self.characters


class Confined:
    """The process, as its parent sees it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        """The process that started it: a fork must not read another's answers."""

    def ask(
        self, name: str, arguments: Mapping[str, Any], limits: Limits, errors: Mapping[str, type[UserError]]
    ) -> tuple[Any, bytes]:
        """Call a function of the process.

        Args:
            name: The function.
            arguments: Its arguments. What JSON does not have becomes text.
            limits: What it may take.
            errors: Errors that it may raise, by name.

        Returns:
            Its result: what JSON can express, and bytes.

        Raises:
            UserError: One of `errors`.
            LimitError: It has taken more than it may, or has ended the process.
        """
        question = json.dumps([name, arguments, limits.memory, limits.seconds], default=str).encode()
        with self._lock:
            process = self._running()
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                _write(process.stdin, question)
                answer, data = _read(_Patient(process.stdout, limits.seconds).read)
            except TimeoutError as error:
                self.close()
                raise LimitError(
                    f"{limits.what} has taken more than {limits.seconds:.0f} seconds and was ended: {limits.way_out}"
                ) from error
            except (OSError, EOFError) as error:
                _give_up(limits, _how(process), error)
            except BaseException:  # Ctrl-C: the answer must not be taken for that of the next request.
                self.close()
                raise
            finally:
                if process.poll() is not None:
                    self.close()
            if "value" in answer:
                return answer["value"], data
            if answer["error"] == "MemoryError":
                _give_up(limits, "")
            if answer["error"] in errors:
                raise errors[answer["error"]](answer["message"])
            raise RuntimeError(f"{name} failed in a process of its own:\n{answer['message']}")

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._owner != os.getpid():
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-c", _START, json.dumps(sys.path)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,  # Rust's reports of panics; they are in the message.
                    env={**os.environ, THREADS: os.environ.get(THREADS, str(ARENAS))},
                    start_new_session=True,  # Ctrl-C is for the parent.
                )
            except OSError as error:
                raise UserError(
                    f"no process can be started for the tokenizer and the chat template: {error}"
                ) from error
            self._owner = os.getpid()
        return self._process

    def close(self) -> None:
        """End the process, if this one has started it."""
        process, self._process = self._process, None
        if process is None or self._owner != os.getpid():
            return
        process.kill()
        for pipe in (process.stdin, process.stdout):
            if pipe:
                with contextlib.suppress(OSError):  # What it has not read.
                    pipe.close()
        process.wait()


CONFINED = Confined()
"""The process of this one, for all tokenizers and templates."""
atexit.register(CONFINED.close)


class _Patient:
    """Reads a pipe for a certain time at most. Time in which this process is stopped does not count."""

    def __init__(self, pipe: IO[bytes], seconds: float) -> None:
        self._pipe, self._left = pipe.fileno(), seconds

    def read(self, size: int) -> bytes:
        """Up to `size` bytes; empty at the end. Raises `TimeoutError`."""
        while not select.select([self._pipe], [], [], wait := min(1.0, self._left))[0]:
            self._left -= wait
            if self._left <= 0:
                raise TimeoutError
        return os.read(self._pipe, size)


def _how(process: subprocess.Popen[bytes]) -> str:
    """How a process ended that was not to end."""
    try:
        code = process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        code = process.wait()
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _give_up(limits: Limits, how: str, error: Exception | None = None) -> NoReturn:
    crash = f", or crashes the library that reads it ({how})" if how else ""
    raise LimitError(
        f"{limits.what} needs more than {limits.memory / GIB:.3g} GiB of memory{crash}: {limits.way_out}"
    ) from error


def _write(pipe: IO[bytes], text: bytes, data: bytes = b"") -> None:
    pipe.write(_LENGTHS.pack(len(text), len(data)))
    pipe.write(text)
    pipe.write(data)
    pipe.flush()


def _read(read: Callable[[int], bytes]) -> tuple[Any, bytes]:
    """The next frame. Raises `EOFError`."""

    def exactly(size: int) -> bytes:
        parts = []
        while size:
            part = read(min(size, 2**20))
            if not part:
                raise EOFError
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    size, more = _LENGTHS.unpack(exactly(_LENGTHS.size))
    return json.loads(exactly(size)), exactly(more)


def serve(functions: Mapping[str, Callable[..., tuple[Any, bytes]]]) -> None:
    """Answer the parent's requests until it ends. Called in the process itself."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # What a library prints is no answer.
    questions = sys.stdin.buffer
    while True:
        try:
            (name, arguments, memory, seconds), _ = _read(questions.read)
        except EOFError:
            return
        with contextlib.suppress(ValueError, OSError):  # macOS limits no address space.
            _limit(memory, seconds)
        data = b""
        try:
            value, data = functions[name](**arguments)
            answer = json.dumps({"value": value})
        except MemoryError:
            answer = json.dumps({"error": "MemoryError"})
        except BaseException as error:  # Rust's panics are no `Exception`.
            expected = isinstance(error, UserError)
            said = str(error) if expected else "".join(traceback.format_exception(error))
            answer = json.dumps({"error": type(error).__name__, "message": said})
        _write(answers, answer.encode(), data)


def _limit(memory: int, seconds: float) -> None:
    """Allow a request so much more memory, and computing for as long as its parent waits, should that one be gone."""
    with open("/proc/self/statm") as file:
        taken = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    wanted = taken + memory
    resource.setrlimit(resource.RLIMIT_AS, (wanted if most == resource.RLIM_INFINITY else min(wanted, most), most))
    used = resource.getrusage(resource.RUSAGE_SELF)
    cpu = int(used.ru_utime + used.ru_stime + seconds * (os.cpu_count() or 1)) + 1
    _, most = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (cpu if most == resource.RLIM_INFINITY else min(cpu, most), most))
