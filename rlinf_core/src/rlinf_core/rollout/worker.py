"""The process of an environment: builds it, plays one episode after another, and never loads torch or a policy.

`python -m rlinf_core.rollout.worker FD` talks over the socket FD with the process that started it (`rollout.pool`),
and ends with it. Both ends are this program, so that pickles are safe here.
"""

from __future__ import annotations

import os
import sys
import threading
import traceback
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlinf_core.contract.environment import Environment, EpisodeError
from rlinf_core.errors import UserError
from rlinf_core.rollout.messages import Act, Asks, Broken, Ended, Play
from rlinf_core.rollout.video import Video

LINES_OF_TRACEBACK = 6


class Worker:
    """Plays episodes; keeps the environment while the task stays the same."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._environment: Environment | None = None
        self._built: tuple[Any, ...] = ()
        self._doing = "build()"

    def run(self) -> None:
        """Play what is asked for until the other end closes."""
        try:
            while True:
                play = self._connection.recv()
                self._connection.send(self._answer(play))
        except (EOFError, OSError):
            return
        finally:
            if self._environment is not None:
                self._environment.close()

    def _answer(self, play: Play) -> Ended | Broken:
        try:
            return self._play(play)
        except (EOFError, BrokenPipeError):
            raise
        except UserError as error:
            return Broken(self._doing, str(error))
        except Exception as error:
            lines = traceback.format_exc().strip().splitlines()
            text = "\n".join(["", *lines[-LINES_OF_TRACEBACK:]])
            return Broken(self._doing, f"{type(error).__name__}: {error}{text}")

    def _play(self, play: Play) -> Ended:
        environment = self._build(play)
        episode = _Episode(play, environment)
        try:
            self._doing = "reset()"
            environment.reset(play.start)
            self._doing = "step()"
            episode.settle()
            while not episode.over:
                self._doing = "observe()"
                self._connection.send(Asks(episode.look(), environment.actions, episode.steps, environment.control_hz))
                act = self._connection.recv()
                self._doing = "step()"
                episode.execute(act)
        except EpisodeError as failure:
            episode.failure = str(failure) or "the environment could not finish the episode"
        self._doing = "frame()"
        return episode.end()

    def _build(self, play: Play) -> Environment:
        wanted = (play.config, play.task)
        if self._environment is None or self._built != wanted:
            self._doing = "close()"
            if self._environment is not None:
                self._environment.close()
                self._environment = None
            self._doing = "build()"
            self._environment = play.config.build(play.task)
            self._built = wanted
        return self._environment


class _Episode:
    """One episode: counts steps and successes, and collects the video."""

    def __init__(self, play: Play, environment: Environment) -> None:
        self._play, self._environment = play, environment
        self._config = play.config
        self._horizon = play.config.horizon or play.task.horizon
        self.steps = 0
        self.failure = ""
        self._success = False
        self._first: int | None = None
        self._reward: float | None = None
        self._ended = False
        self._actions = 0
        self._jerk = Jerk()
        rate = environment.control_hz / (play.config.action_repeat * max(play.video_every or play.config.replan, 1))
        self._video = Video(Path(play.video), rate) if play.video else None

    @property
    def over(self) -> bool:
        """Whether nothing more is to be executed."""
        lasted = self._first is not None and self.steps - self._first >= self._config.after_success
        return self._ended or lasted or self.steps >= self._horizon

    def settle(self) -> None:
        """Let the scene settle; nothing of it counts."""
        for _ in range(self._config.settle_steps):
            self._environment.step(self._environment.actions.idle)

    def look(self) -> Mapping[str, Any] | None:
        """The observation, under the dataset's names, with the instruction."""
        seen: dict[str, Any] | None = None
        if self._play.looks:
            columns = self._config.columns
            seen = {columns.get(name, name): value for name, value in self._environment.observe().items()}
            seen["task"] = self._play.task.prompt
        if self._video is not None and not self._play.video_every:
            self._video.add(self._environment.frame())
        return seen

    def execute(self, act: Act) -> None:
        """Execute actions until they or the episode end."""
        for action in act.actions:
            every = self._play.video_every
            if self._video is not None and every and self._actions % every == 0:
                self._video.add(self._environment.frame())
            self._actions += 1
            if not self.over:
                self._jerk.add(action)
            for _ in range(self._config.action_repeat):
                if self.over:
                    return
                self._step(action)

    def _step(self, action: NDArray[np.float32]) -> None:
        outcome = self._environment.step(action)
        self.steps += 1
        self._success, self._ended = bool(outcome.success), bool(outcome.ended)
        if self._success and self._first is None:
            self._first = self.steps
        if outcome.reward is not None:
            reward = float(outcome.reward)
            self._reward = reward if self._reward is None else max(self._reward, reward)

    def end(self) -> Ended:
        """What came of it."""
        if self._video is not None:
            if not self.failure:
                self._video.add(self._environment.frame())
            self._video.close()
        ever = self._first is not None and not self.failure
        at_end = self._success and not self.failure
        has_video = self._video is not None and self._video.frames > 0
        first = self._first if ever else None
        return Ended(at_end, ever, self.steps, first, self._reward, self.failure, has_video, self._jerk.mean())


class Jerk:
    """The mean length of the second difference of consecutive actions; see `Result.jerk`."""

    def __init__(self) -> None:
        self._last: list[NDArray[np.float64]] = []
        self._sum, self._count = 0.0, 0

    def add(self, action: NDArray[np.float32]) -> None:
        """An action that is executed."""
        self._last = [*self._last[-2:], action.astype(np.float64)]
        if len(self._last) == 3:
            first, second, third = self._last
            self._sum += float(np.linalg.norm(third - 2 * second + first))
            self._count += 1

    def mean(self) -> float | None:
        """Over the episode; None if it had fewer than three actions."""
        return self._sum / self._count if self._count else None


def _end_with(connection_fd: int) -> None:
    """End this process once the other end of the socket is gone, also while the simulator hangs."""
    import select

    poll = select.poll()
    poll.register(connection_fd, select.POLLHUP)
    while not poll.poll(1000):
        pass
    os._exit(0)


def main() -> None:
    """Serve the socket whose number is the argument."""
    number = int(sys.argv[1])
    connection = Connection(number)
    threading.Thread(target=_end_with, args=(os.dup(number),), daemon=True).start()
    for path in connection.recv():
        if path not in sys.path:
            sys.path.append(path)
    Worker(connection).run()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # Renderers report errors when they are torn down at the interpreter's exit.


if __name__ == "__main__":
    main()
