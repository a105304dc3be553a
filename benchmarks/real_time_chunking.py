"""What a policy's delay costs, by how its chunks are joined: success and jerk on a course with two ways past a disk.

    uv run python benchmarks/real_time_chunking.py --json

Two small π0 learn the course in this process (`real_time/training.py`), on one thread: one as usual, one with
`policy.rtc_training_max_delay`. Each plays the same episodes under several delays. `wait`: the robot idles until the
chunk is there; `switch`: it goes on with the last chunk and switches to the next; `guided`: real-time chunking of the
usual policy; `trained`: of the other. Everything follows from the seed, so that load changes nothing but the time.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from real_time.course import HZ, CourseConfig
from real_time.training import HORIZON, train
from reporting.result_line import ResultLine

from rlinf_core.inference import LoadedPolicy
from rlinf_core.results import wilson_interval
from rlinf_core.rollout.config import RolloutSettings
from rlinf_core.rollout.delay import Chunks, DelayedAgent, Latency
from rlinf_core.rollout.episodes import Result, plan_episodes
from rlinf_core.rollout.play import play

WAYS: tuple[Chunks, ...] = ("wait", "switch", "guided", "trained")


def agents_of(usual: LoadedPolicy, trained: LoadedPolicy, delays: list[int], replan: int) -> dict[str, DelayedAgent]:
    """`WAY at DELAY` -> who plays it; without a delay, only what does not wait for anything."""
    agents = {}
    for delay in delays:
        for way in WAYS:
            if delay == 0 and way == "switch":  # The same as waiting.
                continue
            latency = Latency(delay=delay, chunks=way)
            policy = trained if way == "trained" else usual
            agents[f"{way} at {delay}"] = DelayedAgent(policy.act, latency, latency.executed(replan, HORIZON))
        latency = Latency(delay=delay, chunks="switch")
        agents[f"trained, switch at {delay}"] = DelayedAgent(trained.act, latency, latency.executed(replan, HORIZON))
    return agents


def table(results: dict[str, list[Result]]) -> str:
    """A row for each agent, in Markdown."""
    lines = ["| chunks | delay, ms | successes | 95 % interval | jerk | steps |", "|---|---:|---:|---|---:|---:|"]
    for name, own in results.items():
        way, _, delay = name.rpartition(" at ")
        solved = sum(one.ever for one in own)
        rate = wilson_interval(solved, len(own))
        jerk = sum(one.jerk or 0.0 for one in own) / len(own)
        steps = sum(one.steps for one in own) / len(own)
        cells = [way, str(1000 * int(delay) // HZ), f"{solved} of {len(own)}"]
        cells += [f"{rate.low:.2f} to {rate.high:.2f}", f"{jerk:.3f}", f"{steps:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Train, play, and print the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1500, help="optimizer steps of each policy")
    parser.add_argument("--demonstrations", type=int, default=300)
    parser.add_argument("--episodes", type=int, default=200)
    parser.add_argument("--delays", default="0,2,4", help=f"in actions of {1000 // HZ} ms; at most {HORIZON // 2}")
    parser.add_argument("--replan", type=int, default=2, help="actions between observations, at least the delay")
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON object on the last line")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the table")
    options = parser.parse_args()
    line = ResultLine("real_time_chunking", wanted=options.json)
    torch.set_num_threads(1)
    delays = [int(one) for one in options.delays.split(",")]

    def log(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    sizes = {"steps": options.steps, "episodes": options.demonstrations, "seed": options.seed}
    usual = train(max_delay=0, log=log, **sizes)
    trained = train(max_delay=max(*delays, 1), log=log, **sizes)
    agents = agents_of(usual, trained, delays, options.replan)
    settings = RolloutSettings(
        env=CourseConfig(replan=options.replan), episodes=options.episodes, processes=options.processes, videos=0
    )
    results: dict[str, list[Result]] = {name: [] for name in agents}
    start = time.monotonic()
    episodes = plan_episodes(agents, settings.chosen_tasks(), settings.episodes, settings.seed)
    play(settings, episodes, agents, finished=lambda result: results[result.agent].append(result))
    log(f"{len(episodes)} episodes in {time.monotonic() - start:.0f} s")
    text = table(results)
    if options.markdown:
        options.markdown.write_text(text + "\n", encoding="utf-8")
    numbers = {}
    for name, own in results.items():
        numbers[f"success {name}"] = sum(one.ever for one in own) / len(own)
        numbers[f"jerk {name}"] = sum(one.jerk or 0.0 for one in own) / len(own)
    line.write(numbers, text, settings={key: str(value) for key, value in vars(options).items()})


if __name__ == "__main__":
    main()
