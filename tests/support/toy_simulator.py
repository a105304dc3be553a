"""A simulator without physics: a point must reach 1 on a line. Its processes import this module, and never torch."""

import os
import time
from typing import Literal

import numpy as np

from rlinf_core import (
    ActionSpace,
    EnvironmentConfig,
    EnvironmentTask,
    EpisodeError,
    Outcome,
    UserError,
    hookimpl,
)

HORIZON = 40
PROMPT = "go to the right"


class Line:
    """A point on a line, which starts between -0.5 and 0.5 and moves by a tenth of the first number of each action."""

    control_hz = 20.0
    actions = ActionSpace(low=np.full(2, -1, np.float32), high=np.full(2, 1, np.float32), idle=np.zeros(2, np.float32))

    def __init__(self, config, task):
        self.config, self.task = config, task
        self.misbehave("build")

    def misbehave(self, at):
        kind, _, place = self.config.fault.partition(":")
        if place != at:
            return
        if kind == "raise":
            raise ValueError("the point is lost")
        if kind == "user":
            raise UserError("the line is not installed: pip install line")
        if kind == "fail":
            raise EpisodeError("the point is unstable")
        if kind == "exit":
            print("line: fatal: out of memory", flush=True)
            os._exit(3)
        if kind == "hang":
            time.sleep(600)

    def reset(self, start):
        self.misbehave("reset")
        if start.initial_state is not None:
            self.x = -0.1 * start.initial_state
        else:
            self.x = float(np.random.default_rng(start.seed).uniform(-0.5, 0.5))
        self.path = [self.x]

    def observe(self):
        self.misbehave("observe")
        state = np.array([self.x, len(self.path) - 1, 1], np.float32)
        image = np.zeros((16, 24, 3), np.uint8)
        image[:, min(23, int((self.x + 1) * 10))] = 255
        seen = {"point": state, "image": image}
        if self.config.whole_row:
            seen |= {"actions": np.zeros((4, 2), np.float32), "index": 0}
        return seen

    def step(self, action):
        if len(self.path) > 3:
            self.misbehave("step")
        time.sleep(self.config.seconds_a_step)
        self.x += 0.1 * float(np.clip(action[0], -1, 1))
        self.path.append(self.x)
        return Outcome(success=0.95 <= self.x <= 1.15, reward=min(self.x, 1.0))

    def frame(self):
        return self.observe()["image"]

    def close(self):
        pass


class LineConfig(EnvironmentConfig):
    """The environment `line`."""

    type: Literal["line"] = "line"
    states: int = 0
    fault: str = ""
    seconds_a_step: float = 0.0
    whole_row: bool = False
    """Also give what the toy policy of `toy_data` takes from recorded rows only."""
    names: tuple[str, ...] = ("right", "right again")

    def tasks(self):
        return [EnvironmentTask(name, PROMPT, HORIZON, self.states) for name in self.names]

    def build(self, task):
        return Line(self, task)


class Sawyer(Line):
    """The line, in the columns of the repository's MetaWorld data."""

    control_hz = 80.0
    actions = ActionSpace(low=np.full(4, -1, np.float32), high=np.full(4, 1, np.float32), idle=np.zeros(4, np.float32))

    def observe(self):
        self.misbehave("observe")
        image = np.full((224, 224, 3), 90, np.uint8)
        return {"observation.image": image, "observation.state": np.float32([self.x, 0.6, 0.2, 1.0])}

    def frame(self):
        return self.observe()["observation.image"]


class SawyerConfig(LineConfig):
    """The environment `sawyer`."""

    type: Literal["sawyer"] = "sawyer"

    def tasks(self):
        return [EnvironmentTask("reach", "Reach a goal position", HORIZON), EnvironmentTask("wave", "Wave", HORIZON)]

    def build(self, task):
        return Sawyer(self, task)

    def facts(self):
        return {"sawyer": "1.0"}


@hookimpl
def rlinf_register_environments():
    return [LineConfig, SawyerConfig]
