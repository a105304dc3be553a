"""What a policy's delay costs, by how its chunks are joined: success and jerk on a course with two ways past a disk.

    uv run python benchmarks/real_time_chunking.py --json

A small π0 learns the course in this process (`real_time/training.py`), on one thread, with
`policy.rtc_training_max_delay`: it acts without a delay as well, so that one policy plays all. `wait`: the robot idles
until the chunk is there; `switch`: it goes on with the last chunk and switches to the next; `guided` and `trained`:
real-time chunking. All play the same episodes with the same noise. Everything follows from the seed, so that load
changes nothing but the time.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from real_time.course import HZ, Conditions, Course, CourseConfig
from real_time.training import train
from reporting.result_line import ResultLine

from rlinf_core.inference import LoadedPolicy
from rlinf_core.results import wilson_interval
from rlinf_core.rollout.delay import Chunks, DelayedAgent, Latency
from rlinf_core.rollout.episodes import Episode, plan_episodes
from rlinf_core.rollout.pool import Asking
from rlinf_core.rollout.worker import Jerk

WAYS: tuple[Chunks, ...] = ("wait", "switch", "guided", "trained")


@dataclass(eq=False)
class Played:
    """An episode that is being played in this process."""

    episode: Episode
    generator: np.random.Generator
    course: Course
    jerk: Jerk = field(default_factory=Jerk)
    steps: int = 0
    success: bool = False
    over: bool = False

    def execute(self, actions: np.ndarray) -> None:
        """Execute actions until they or the episode end."""
        for action in actions:
            if self.over:
                return
            self.jerk.add(np.asarray(action, np.float32))
            outcome = self.course.step(action)
            self.steps += 1
            self.success = bool(outcome.success)
            self.over = self.success or outcome.ended or self.steps >= self.episode.task.horizon


def play_together(agent: DelayedAgent, episodes: Sequence[Episode], conditions: Conditions) -> list[Played]:
    """Play episodes in step, as one batch."""
    played = [Played(one, np.random.default_rng([one.start.seed, one.number]), Course(conditions)) for one in episodes]
    for one in played:
        one.course.reset(one.episode.start)
    while left := [one for one in played if not one.over]:
        asking = [
            Asking(one.episode, one.course.observe(), one.course.actions, one.steps, one.generator) for one in left
        ]
        for one, actions in zip(left, agent(asking), strict=True):
            one.execute(actions)
    return played


def play_all(
    policy: LoadedPolicy, delays: Sequence[int], replan: int, episodes: int, chunk: int, conditions: Conditions
) -> dict[str, list[Played]]:
    """`WAY at DELAY` -> its episodes."""
    planned = plan_episodes(["policy"], CourseConfig().tasks(), episodes, 100_000)
    found = {}
    for delay in delays:
        for way in WAYS:
            if delay or way != "switch":  # Without a delay the same as waiting.
                latency = Latency(delay=delay, chunks=way)
                agent = DelayedAgent(policy.act, latency, latency.executed(replan, chunk))
                found[f"{way} at {delay}"] = play_together(agent, planned, conditions)
    return found


def table(results: Mapping[str, Sequence[Played]]) -> str:
    """A row for each way and delay, in Markdown."""
    lines = ["| chunks | delay, ms | successes | 95 % interval | jerk | steps |", "|---|---:|---:|---|---:|---:|"]
    for name, own in results.items():
        way, _, delay = name.rpartition(" at ")
        solved = sum(one.success for one in own)
        rate = wilson_interval(solved, len(own))
        cells = [way, str(1000 * int(delay) // HZ), f"{solved} of {len(own)}"]
        cells += [f"{rate.low:.2f} to {rate.high:.2f}", f"{jerk_of(own):.3f}"]
        lines.append(f"| {' | '.join(cells)} | {np.mean([one.steps for one in own]):.1f} |")
    return "\n".join(lines)


def jerk_of(played: Sequence[Played]) -> float:
    """The mean over episodes."""
    return float(np.mean([one.jerk.mean() or 0.0 for one in played]))


def main() -> None:
    """Train, play, and print the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000, help="optimizer steps")
    parser.add_argument("--demonstrations", type=int, default=300)
    parser.add_argument("--episodes", type=int, default=200)
    parser.add_argument("--delays", default="0,2,4", help=f"in actions of {1000 // HZ} ms; at most half a chunk")
    parser.add_argument("--chunk", type=int, default=16, help="actions in a chunk")
    parser.add_argument("--radius", type=float, default=Conditions.radius, help="of the disk; the course is 1 long")
    parser.add_argument("--wind", type=float, default=Conditions.wind, help="standard deviation per step")
    parser.add_argument("--demonstrated-wind", type=float, default=0.006, help="the same, while demonstrating")
    parser.add_argument("--replan", type=int, default=2, help="actions between observations, at least the delay")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON object on the last line")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the table")
    options = parser.parse_args()
    line = ResultLine("real_time_chunking", wanted=options.json)
    torch.set_num_threads(1)
    delays = [int(one) for one in options.delays.split(",")]
    conditions = Conditions(options.radius, options.wind)
    policy = train(
        conditions=Conditions(options.radius, options.demonstrated_wind),
        max_delay=options.chunk // 2,
        chunk=options.chunk,
        steps=options.steps,
        episodes=options.demonstrations,
        seed=options.seed,
        log=lambda text: print(text, file=sys.stderr, flush=True),
    )
    results = play_all(policy, delays, options.replan, options.episodes, options.chunk, conditions)
    text = table(results)
    if options.markdown:
        options.markdown.write_text(text + "\n", encoding="utf-8")
    numbers = {f"success {name}": float(np.mean([one.success for one in own])) for name, own in results.items()}
    numbers |= {f"jerk {name}": jerk_of(own) for name, own in results.items()}
    line.write(numbers, text, settings={key: str(value) for key, value in vars(options).items()})


if __name__ == "__main__":
    main()
