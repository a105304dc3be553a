"""What an evaluation in a simulator costs the ranks of a run besides its own time.

    python benchmarks/evaluation_cost.py [--rounds 3] [--json]

Two ranks train the toy policy of the tests, each step of which takes 50 ms on every rank, with the toy simulator as
evaluator twice in the run, and without it, in turns. The episodes of an evaluation take `--seconds` of simulated steps.
On each rank the clock runs over the whole training loop, over each of its steps and over each call of the evaluator.
`other_seconds` is what the loop with evaluations takes besides these, less what the loop without takes besides its
steps, for the rank that it costs most, and `over_training` that as a share of the training without evaluations.
`steps_ratio` are the steps of both runs, most of which is the same sleep. `apart` is the largest difference between the
ranks' clocks of one evaluation: what one rank waits longer than the other. Each rank computes with one thread, as under
torchrun.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from reporting.result_line import ResultLine

SUPPORT = Path(__file__).parents[1] / "tests" / "support"
STEPS, EVERY, SECONDS_A_STEP = 40, 20, 0.05
CONFIG = """
[data]
config_name = "toy"
num_workers = 0
[trainer]
device = "cpu"
param_dtype = "fp32"
global_batch_size = 20
micro_batch_size = 10
[optim]
warmup_steps = 0
[runner]
max_steps = {steps}
save_interval = {steps}
"""
SIMULATOR = """
evaluators = ["simulator"]
val_check_interval = {every}
[evaluators.simulator]
episodes = 2
baselines = []
[evaluators.simulator.env]
type = "line"
whole_row = true
replan = 2
columns = {{ point = "state", image = "camera" }}
seconds_a_step = {seconds_a_step}
"""


def train(folder: Path, *, simulated: bool, seconds_a_step: float) -> list[dict[str, Any]]:
    """Train on two ranks; each rank's seconds of training and of its evaluations."""
    folder.mkdir()
    text = CONFIG.format(steps=STEPS)
    if simulated:
        text += SIMULATOR.format(every=EVERY, seconds_a_step=seconds_a_step)
    (config := folder / "toy.toml").write_text(text)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    group["OMP_NUM_THREADS"] = "1"
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, "--rank", str(folder / "run"), str(config)],
            env=os.environ | group | {"RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": str(SUPPORT)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    return [json.loads(one.communicate(timeout=300)[0].splitlines()[-1]) for one in ranks]


def _besides(clocks: dict[str, list[float]]) -> float:
    """Seconds of the training loop outside its steps and evaluations."""
    return clocks["training"][0] - sum(clocks["steps"]) - sum(clocks["evaluations"])


def _rank(folder: str, config: str) -> None:
    """One rank: train with the clocks around."""
    import simulator_ranks
    import toy_policy

    from rlinf_core.evaluators.rollouts import Rollouts
    from rlinf_core.training.trainer import Fsdp2Trainer

    clocks: dict[str, list[float]] = {"training": [], "steps": [], "evaluations": []}

    def timed(owner: Any, name: str, clock: str) -> None:
        inner = getattr(owner, name)

        def call(*arguments: Any, **options: Any) -> Any:
            began = time.perf_counter()
            try:
                return inner(*arguments, **options)
            finally:
                clocks[clock].append(time.perf_counter() - began)

        setattr(owner, name, call)

    forward = toy_policy.ToyModule.forward
    toy_policy.ToyModule.forward = lambda self, batch: time.sleep(SECONDS_A_STEP) or forward(self, batch)
    timed(Rollouts, "evaluate", "evaluations")
    timed(Fsdp2Trainer, "_train_step", "steps")
    timed(Fsdp2Trainer, "train", "training")
    simulator_ranks.main([folder, config])
    print(json.dumps(clocks), flush=True)


def main() -> None:
    """Measure, and print the result."""
    if sys.argv[1:2] == ["--rank"]:
        _rank(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds-a-step", type=float, default=0.02, help="of the simulator; an episode has up to 40")
    parser.add_argument("--json", action="store_true", help="print one JSON object on the last line")
    options = parser.parse_args()
    line = ResultLine("evaluation_cost", wanted=options.json)
    rounds = []
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(options.rounds):
            found = {
                simulated: train(
                    Path(scratch) / f"{number}_{simulated}", simulated=simulated, seconds_a_step=options.seconds_a_step
                )
                for simulated in ((True, False) if number % 2 else (False, True))
            }
            rounds.append([(found[True][rank], found[False][rank]) for rank in range(2)])
    other = [max(_besides(with_) - _besides(without) for with_, without in ranks) for ranks in rounds]
    plain = statistics.median(without["training"][0] for ranks in rounds for _, without in ranks)
    pairs = [zip(*(with_["evaluations"] for with_, _ in ranks), strict=True) for ranks in rounds]
    results = {
        "training_seconds": plain,
        "evaluation_seconds": statistics.median(sum(with_["evaluations"]) for ranks in rounds for with_, _ in ranks),
        "other_seconds": statistics.median(other),
        "over_training": statistics.median(other) / plain,
        "steps_ratio": statistics.median(sum(w["steps"]) / sum(wo["steps"]) for ranks in rounds for w, wo in ranks),
        "apart_seconds": max(abs(one - two) for both in pairs for one, two in both),
    }
    text = (
        f"evaluations took {results['evaluation_seconds']:.2f} s beside {plain:.2f} s of training, nothing else took "
        f"more than {results['other_seconds']:.2f} s; ranks waited {results['apart_seconds']:.2f} s for one another"
    )
    line.write(results, text, rounds=rounds, settings=vars(options))


if __name__ == "__main__":
    main()
