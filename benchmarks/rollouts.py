"""How rollouts scale with the processes of the environment: control steps per second in MetaWorld, images included.

    uv run --group simulators python benchmarks/rollouts.py --json

The policy looks every second action and computes nothing, so that the processes are what is measured. One and two
processes take turns; the result is the median of the rounds' ratios. Each renders with one thread (`LP_NUM_THREADS`);
`steps_per_second_alone` is one process that renders with a thread per core, as a single one does by default. Starting a
process, building its environment and the first reset are not counted: a round's clock starts once all processes ask for
their first actions. `serial_share` limits any number of processes, whatever else the machine does: the CPU time of the
process that hands out actions and receives images, per second, beside one process of the environment.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from importlib import metadata

import numpy as np
from reporting.result_line import ResultLine

from rlinf_core.rollout.config import RolloutSettings
from rlinf_core.rollout.episodes import plan_episodes
from rlinf_core.rollout.pool import Pool

CHUNK = np.array([[0.1, 0.05, 0.0, 0.0], [-0.1, -0.05, 0.0, 0.0]], np.float32)
"""Stays where it is, and never solves the task."""


def steps_per_second(settings: RolloutSettings, processes: int, threads: int) -> tuple[float, float]:
    """Control steps per second of all processes together, and of that time the share of this process's CPU time.

    Args:
        settings: What is played.
        processes: Processes of the environment.
        threads: Threads with which Mesa renders in each.
    """
    os.environ["LP_NUM_THREADS"] = str(threads)
    settings = settings.model_copy(update={"processes": processes})
    episodes = plan_episodes(["policy"], settings.chosen_tasks(), settings.episodes * processes, settings.seed)
    steps = 0

    def finished(result: object) -> None:
        nonlocal steps
        steps += result.steps  # type: ignore[attr-defined]

    with Pool(settings, episodes, looks=lambda name: True, finished=finished) as pool:
        asking = []
        while len(asking) < processes:
            asking += pool.asking()
        started, computed = time.perf_counter(), time.process_time()
        while pool.unfinished:
            for one in asking:
                pool.act(one, CHUNK)
            asking = pool.asking()
        seconds = time.perf_counter() - started
        return steps / seconds, (time.process_time() - computed) / seconds


def main() -> None:
    """Measure, and print the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--episodes", type=int, default=4, help="per process and round, of 500 control steps")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--horizon", type=int, default=500)
    parser.add_argument("--json", action="store_true", help="print one JSON object on the last line")
    options = parser.parse_args()
    from rlinf_plugins_metaworld.config import MetaworldConfig

    line = ResultLine("rollouts", wanted=options.json)
    env = MetaworldConfig(image_size=options.image_size, shadows=False, action_repeat=4, horizon=options.horizon)
    settings = RolloutSettings(env=env, tasks=("reach-v3",), episodes=options.episodes, videos=0)
    rounds, shares = [], []
    for number in range(options.rounds):
        ways = [(1, 1), (2, 1), (1, os.cpu_count() or 1)]  # Processes, threads of each.
        found = {way: steps_per_second(settings, *way) for way in (ways if number % 2 == 0 else ways[::-1])}
        rounds.append([found[way][0] for way in ways])
        shares.append(found[1, 1][1])
    ratio = statistics.median(two / one for one, two, _ in rounds)
    results = {
        "steps_per_second_1": statistics.median(one for one, _, _ in rounds),
        "steps_per_second_2": statistics.median(two for _, two, _ in rounds),
        "steps_per_second_alone": statistics.median(alone for _, _, alone in rounds),
        "two_over_one": ratio,
        "serial_share": statistics.median(shares),
    }
    text = (
        f"{results['steps_per_second_1']:.0f} control steps per second in one process, "
        f"{results['steps_per_second_2']:.0f} in two: {ratio:.2f} times as many"
    )
    versions = {name: metadata.version(name) for name in ("metaworld", "mujoco", "numpy")}
    line.write(results, text, rounds=rounds, versions=versions, settings=vars(options))


if __name__ == "__main__":
    main()
