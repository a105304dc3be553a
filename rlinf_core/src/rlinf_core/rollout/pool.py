"""Environments in processes: which plays which episode, what asks for actions, and what came of each.

The processes are started, never forked: simulators and renderers do not survive a fork, and a policy may be on a GPU.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import metadata
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
from numpy.typing import NDArray

from rlinf_core.contract.environment import ActionSpace, EnvironmentConfig
from rlinf_core.errors import PluginError, UserError
from rlinf_core.rollout.config import RolloutSettings
from rlinf_core.rollout.episodes import Episode, Result
from rlinf_core.rollout.messages import Act, Asks, Broken, Ended, Play
from rlinf_core.rollout.seeds import generator_of, seed_of

LAST_OUTPUT = 1000
"""Characters of a broken process' output that its error shows."""
SECONDS_TO_CLOSE = 5.0
RATES_DIFFER = 0.05
"""Relative difference between the rates of data and environment that is reported."""
VIDEOS = "videos"


@dataclass(frozen=True, eq=False)
class Asking:
    """An episode that asks for actions."""

    episode: Episode
    observation: Mapping[str, Any] | None
    """A row in the dataset's format; None for an agent that does not look."""
    space: ActionSpace
    steps: int
    """Control steps so far."""
    generator: np.random.Generator
    """The episode's own; draws the noise of its actions."""


@dataclass(eq=False)
class _Process:
    """A process of an environment, and the episode that it plays."""

    process: subprocess.Popen[bytes]
    connection: Connection
    output: IO[bytes]
    episode: Episode | None = None
    generator: np.random.Generator = field(default_factory=np.random.default_rng)
    video: str = ""
    started: float = 0.0
    deadline: float = float("inf")


class Pool:
    """Plays episodes in processes; use it as a context manager, which ends them.

    Args:
        settings: The environment and how to play.
        episodes: What to play; a process takes those of the same task first, so that it builds fewer environments.
        looks: Whether an agent needs observations.
        folder: Where videos are written.
        finished: Called with each result.
        step_seconds: Seconds between the actions of a chunk in the training data; 0: unknown.
        warn: Called with what makes a success rate mean little.
    """

    def __init__(
        self,
        settings: RolloutSettings,
        episodes: Iterable[Episode],
        *,
        looks: Callable[[str], bool],
        folder: Path | None = None,
        finished: Callable[[Result], object] = lambda result: None,
        step_seconds: float = 0.0,
        warn: Callable[[str], object] = lambda text: None,
    ) -> None:
        self._step_seconds, self._warn = step_seconds, warn
        self._settings, self._looks, self._finished = settings, looks, finished
        self._waiting = list(episodes)
        self._folder = folder
        self._kept: dict[tuple[str, bool], int] = {}
        self._processes: list[_Process] = []
        self._playing: dict[tuple[str, str, int], _Process] = {}

    def __enter__(self) -> Self:
        try:
            for _ in range(min(self._settings.processes, len(self._waiting))):
                self._processes.append(_start_process(self._settings.processes))
            for one in self._processes:
                self._next(one)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    @property
    def unfinished(self) -> bool:
        """Whether episodes are being played, or wait to be."""
        return bool(self._playing or self._waiting)

    def asking(self, seconds: float = float("inf")) -> list[Asking]:
        """Wait until an episode asks for actions; returns all that do, none once all have ended or after a while.

        Args:
            seconds: How long to wait at most.

        Raises:
            PluginError: An environment raised an error, its process died, or it took too long.
        """
        found: list[Asking] = []
        until = time.monotonic() + seconds
        while self._playing and not found:
            busy = {one.connection: one for one in self._processes if one.deadline < float("inf")}
            if not busy:  # All that play have asked already.
                break
            now = time.monotonic()
            first = min(one.deadline for one in busy.values())
            ready = wait(list(busy), max(0.0, min(first, until) - now))
            for connection in ready:
                found += self._receive(busy[connection])  # type: ignore[index]
            now = time.monotonic()
            for one in busy.values():
                if one.deadline <= now and one.connection not in ready:
                    self._took_too_long(one)
            if now >= until:
                break
        return found

    def act(self, asking: Asking, actions: NDArray[np.floating]) -> None:
        """Execute actions.

        Args:
            asking: What asks for them.
            actions: [n, D], in the units of the dataset.

        Raises:
            UserError: They do not fit the environment.
        """
        width = len(asking.space.idle)
        if actions.ndim != 2 or actions.shape[1] != width or not len(actions):
            raise UserError(
                f"the actions for {self._name(asking.episode)} are {list(actions.shape)}, but it takes actions of "
                f"{width} numbers: the policy was trained on the data of another robot or controller"
            )
        if not np.isfinite(actions).all():
            raise UserError(f"an action for {self._name(asking.episode)} contains NaN or infinity")
        one = self._playing[asking.episode.key]
        self._send(one, Act(np.ascontiguousarray(actions, np.float32)))

    def close(self) -> None:
        """End the processes."""
        for one in self._processes:
            one.connection.close()
        until = time.monotonic() + SECONDS_TO_CLOSE
        for one in self._processes:
            with suppress(subprocess.TimeoutExpired):
                one.process.wait(max(0.0, until - time.monotonic()))
            _kill(one.process)
            one.output.close()
        self._processes = []

    def _next(self, one: _Process) -> None:
        """Let a process play an episode, of its last task if there is one."""
        if not self._waiting:
            one.episode, one.deadline = None, float("inf")
            return
        chosen = self._choose(one.episode)
        self._waiting.remove(chosen)
        one.episode, one.started = chosen, time.monotonic()
        one.generator = generator_of(seed_of(chosen))
        one.video = self._video_of(chosen)
        self._playing[chosen.key] = one
        settings = self._settings
        play = Play(settings.env, chosen.task, chosen.start, self._looks(chosen.agent), one.video, settings.video_every)
        self._send(one, play)

    def _choose(self, last: Episode | None) -> Episode:
        if last is not None:
            for episode in self._waiting:
                if episode.task == last.task:
                    return episode
        played = {one.episode.task.name for one in self._processes if one.episode is not None}
        return next((episode for episode in self._waiting if episode.task.name not in played), self._waiting[0])

    def _send(self, one: _Process, message: Play | Act) -> None:
        one.deadline = time.monotonic() + self._settings.timeout_seconds
        try:
            one.connection.send(message)
        except OSError:
            self._died(one)

    def _receive(self, one: _Process) -> list[Asking]:
        episode = one.episode
        assert episode is not None
        try:
            message = one.connection.recv()
        except (EOFError, OSError):
            self._died(one)
        if isinstance(message, Asks):
            one.deadline = float("inf")
            self._compare_rates(message.control_hz)
            return [Asking(episode, message.observation, message.actions, message.steps, one.generator)]
        if isinstance(message, Broken):
            raise PluginError(f"{self._name(episode)}: {message.doing} failed: {message.text} [{self._owner}]")
        assert isinstance(message, Ended)
        self._end(one, episode, message)
        return []

    def _compare_rates(self, control_hz: float) -> None:
        """Warn once if actions take longer or shorter than in the training data."""
        if self._step_seconds and control_hz:
            rate, trained = control_hz / self._settings.env.action_repeat, 1 / self._step_seconds
            if abs(rate / trained - 1) > RATES_DIFFER:
                self._warn(
                    f"{self._settings.env.type} executes {rate:.4g} actions per second ({control_hz:g} control steps, "
                    f"action_repeat {self._settings.env.action_repeat}), but the training data have {trained:.4g}: set "
                    f"env.action_repeat to {max(1, round(control_hz / trained))}"
                )
        self._step_seconds = 0.0

    def _end(self, one: _Process, episode: Episode, ended: Ended) -> None:
        del self._playing[episode.key]
        result = Result(
            agent=episode.agent,
            task=episode.task.name,
            number=episode.number,
            seed=episode.start.seed,
            initial_state=episode.start.initial_state,
            success=ended.success,
            ever=ended.ever,
            steps=ended.steps,
            first_success=ended.first_success,
            best_reward=ended.best_reward,
            jerk=ended.jerk,
            failure=ended.failure,
            seconds=round(time.monotonic() - one.started, 3),
            video=self._keep_video(one, episode, ended),
        )
        self._next(one)
        self._finished(result)

    def _video_of(self, episode: Episode) -> str:
        """Where to write the video of an episode; empty if enough are kept of its task."""
        kept = (self._kept.get((episode.task.name, ever), 0) for ever in (True, False))
        if self._folder is None or not self._looks(episode.agent) or min(kept) >= self._settings.videos:
            return ""
        return str(self._folder / VIDEOS / f".{_slug(episode.task.name)}_{episode.number:03d}.mp4")

    def _keep_video(self, one: _Process, episode: Episode, ended: Ended) -> str:
        """Give the video its name, or remove it; returns the name."""
        if not one.video or not ended.has_video or self._folder is None:
            return ""
        written, kind = Path(one.video), (episode.task.name, ended.ever)
        if self._kept.get(kind, 0) >= self._settings.videos:
            written.unlink(missing_ok=True)
            return ""
        self._kept[kind] = self._kept.get(kind, 0) + 1
        name = f"{_slug(episode.task.name)}_{episode.number:03d}_{'success' if ended.ever else 'failure'}.mp4"
        written.rename(written.with_name(name))
        return f"{VIDEOS}/{name}"

    def _name(self, episode: Episode) -> str:
        start = episode.start
        state = "" if start.initial_state is None else f", initial state {start.initial_state}"
        return (
            f"environment {self._settings.env.type!r}, task {episode.task.name!r}, episode {episode.number} of "
            f"{episode.agent} (seed {start.seed}{state})"
        )

    @property
    def _owner(self) -> str:
        """The package that brings the environment."""
        return owner_of(self._settings.env)

    def _died(self, one: _Process) -> Any:
        assert one.episode is not None
        with suppress(subprocess.TimeoutExpired):
            one.process.wait(SECONDS_TO_CLOSE)
        code = one.process.returncode
        how = f"was ended by {signal.Signals(-code).name}" if code is not None and code < 0 else f"ended, code {code}"
        raise PluginError(f"{self._name(one.episode)}: its process {how}{_last_output(one)} [{self._owner}]")

    def _took_too_long(self, one: _Process) -> None:
        assert one.episode is not None
        _kill(one.process)
        raise PluginError(
            f"{self._name(one.episode)}: no answer for {self._settings.timeout_seconds:g} s (timeout_seconds)"
            f"{_last_output(one)} [{self._owner}]"
        )


def _start_process(processes: int) -> _Process:
    """Start one of several processes, in a session of its own, which Ctrl-C does not reach."""
    ours, theirs = socket.socketpair()
    output = tempfile.TemporaryFile()  # noqa: SIM115  Closed with the process.
    with theirs:
        # -P: modules of the current folder are not imported by accident.
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "rlinf_core.rollout.worker", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            env=_environment_variables(processes),
        )
    connection = Connection(ours.detach())
    connection.send(sys.path)
    return _Process(process, connection, output)


def _environment_variables(processes: int) -> dict[str, str]:
    """What starts no more threads than there are cores: environments share them with each other and the policy.

    Mesa renders in software with a thread per core in every process (`LP_NUM_THREADS`), and two such processes get in
    each other's way. What the user has set stays.
    """
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # In a run, each plays in as many processes.
    threads = max(1, (os.cpu_count() or 1) // (processes * ranks))
    return {"OMP_NUM_THREADS": "1", "LP_NUM_THREADS": str(threads), **os.environ}


def _kill(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _last_output(one: _Process) -> str:
    """The end of what the process has printed."""
    one.output.seek(0, os.SEEK_END)
    one.output.seek(max(0, one.output.tell() - LAST_OUTPUT))
    text = one.output.read().decode(errors="replace").strip()
    return f"; the end of its output:\n{text}\n" if text else ""


def owner_of(config: EnvironmentConfig) -> str:
    """The distribution and version of an environment's class; its module if it is of none."""
    module = type(config).__module__
    for name in metadata.packages_distributions().get(module.partition(".")[0], ()):
        return f"{name} {metadata.version(name)}"
    return f"module {module}"


def _slug(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in name)[:80]


def episodes_left(episodes: Sequence[Episode], done: Iterable[tuple[str, str, int]]) -> list[Episode]:
    """The episodes that are not finished yet."""
    finished = set(done)
    return [episode for episode in episodes if episode.key not in finished]
