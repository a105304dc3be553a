"""The evaluator `simulator` in runs of the toy policy: metrics, files, several ranks, and what it leaves of a run."""

import json
import os
import signal

import pytest
import torch
import toy_policy
import toy_simulator
from distributions import entry_point, repository_entry_points

from rlinf_core import PluginError, UserError
from rlinf_core.evaluators import rollouts
from rlinf_core.loggers.jsonl import read_rows
from rlinf_core.plugins.registry import DATASET_GROUP, PLUGIN_GROUP, Plugins
from rlinf_core.results import evaluations_of, read_table
from rlinf_core.rollout import pool
from rlinf_core.rollout.episodes import Result

COLUMNS = '"columns" = {"point" = "state", "image" = "camera"}'


def simulated(**options):
    env = "".join(f", {key} = {json.dumps(value)}" for key, value in options.items())
    table = '{type = "line", whole_row = true, replan = 2, horizon = 12, ' + COLUMNS + env + "}"
    return [
        "runner.evaluators=['simulator']",
        f"evaluators.simulator.env={table}",
        "evaluators.simulator.episodes=2",
        "evaluators.simulator.timeout_seconds=60",
        "runner.val_check_interval=2",
        "runner.max_steps=4",
    ]


@pytest.fixture
def toy_plugins():
    return Plugins(
        [
            *repository_entry_points(),
            entry_point(PLUGIN_GROUP, "toy", toy_policy, "toy-policy"),
            entry_point(DATASET_GROUP, "toy", toy_policy.TrainableToyDataset, "toy-policy"),
            entry_point(PLUGIN_GROUP, "line", toy_simulator, "line"),
        ]
    )


def test_a_run_reports_success_with_intervals_and_videos(train_toy, capsys):
    trainer = train_toy(*simulated(), "evaluators.simulator.baselines=['idle','random']", "optim.ema_decay=0.5")
    rows = [row for row in read_rows(trainer.run.folder / "metrics.jsonl") if "success" in row]
    assert [row["step"] for row in rows] == [2, 4]
    names = {"success", "success_at_end", "success/right", "success/right again"}
    for row in rows:
        assert names | {f"ema_{name}" for name in names} | {"success_idle", "success_random"} <= row.keys()
        assert "ema_success_idle" not in row
    found = [one for one in evaluations_of(trainer.run.folder) if one.evaluator == "simulator"]
    assert [(one.step, one.ema) for one in found] == [(2, False), (2, True), (4, False), (4, True)]
    for one in found:
        assert {"success.table.json", "episodes.jsonl"} < one.files.keys()
        assert any(name.endswith(("_success.mp4", "_failure.mp4")) for name in one.files)
        table = read_table(one.files["success.table.json"])
        assert table.columns[:4] == ("task", "success", "idle action", "random actions")
        assert [row[0] for row in table.rows] == ["right", "right again", "(all)"]
        assert table.rows[-1][-1] == 4
    out = capsys.readouterr().out
    assert "step 4: Success in line: " in out
    assert "of 4 episodes; idle action 0 (0 to 0.4899), random actions" in out


def test_baselines_are_played_once_per_run_also_if_it_resumes(train_toy, monkeypatch):
    played = []
    play = rollouts.Rollouts._play
    monkeypatch.setattr(
        rollouts.Rollouts, "_play", lambda self, agents, _: played.append([*agents]) or play(self, agents, _)
    )
    luck = "evaluators.simulator.baselines=['idle']"
    train_toy(*simulated(), luck, "runner.max_steps=2")
    train_toy(*simulated(), luck, "runner.max_steps=4")
    assert played == [["idle"], ["policy"], ["policy"]]


def test_an_evaluation_leaves_no_process_and_no_trace_in_training(train_toy, monkeypatch):
    """It costs a run its own time and nothing else: the same weights to the bit, and nothing that still computes."""
    started = []
    start = pool._start_process
    monkeypatch.setattr(pool, "_start_process", lambda count: started.append(start(count)) or started[-1])

    def weights(*overrides):
        trainer = train_toy(*overrides)
        assert all(one.process.poll() is not None for one in started)
        return [parameter.detach().to_local().clone() for parameter in trainer.policy.parameters()]

    plain = weights("runner.max_steps=4", "runner.name=plain", "runner.val_check_interval=2")
    simulated_too = weights(*simulated(), "evaluators.simulator.baselines=[]", "runner.name=simulated")
    assert len(started) == 4  # Two evaluations with two processes.
    assert all(torch.equal(one, other) for one, other in zip(plain, simulated_too, strict=True))


def test_processes_that_render_in_software_share_the_cores(monkeypatch):
    """Mesa would start a thread per core in each."""
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    monkeypatch.delenv("LP_NUM_THREADS", raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert [pool._environment_variables(count)["LP_NUM_THREADS"] for count in (1, 3, 16)] == ["8", "2", "1"]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert pool._environment_variables(2)["LP_NUM_THREADS"] == "2"
    monkeypatch.setenv("LP_NUM_THREADS", "5")
    assert pool._environment_variables(2)["LP_NUM_THREADS"] == "5"


def test_a_fault_in_the_simulator_ends_the_run_with_its_name(train_toy):
    with pytest.raises(
        UserError, match=r"(?s)environment 'line', task 'right.*', episode 0 .*ValueError: the point is lost"
    ):
        train_toy(*simulated(fault="raise:step"), "evaluators.simulator.baselines=[]")


def test_a_signal_interrupts_an_evaluation_which_is_repeated(train_toy, monkeypatch):
    first = []

    def stop(self, pool, asking, agents):
        if not first:
            first.append(os.kill(os.getpid(), signal.SIGTERM))
        act(self, pool, asking, agents)

    act = rollouts.Rollouts._act
    monkeypatch.setattr(rollouts.Rollouts, "_act", stop)
    options = [*simulated(), "evaluators.simulator.baselines=[]"]
    trainer = train_toy(*options)
    assert trainer.step == 2
    trainer = train_toy(*options)
    assert [r["step"] for r in read_rows(trainer.run.folder / "metrics.jsonl") if "success" in r] == [2, 4]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("evaluators.simulator.tasks=['left']", r"evaluators\.simulator.*: .*has no task 'left'"),
        (
            "evaluators.simulator.env='lime'",
            r"evaluators\.simulator\.env: unknown environment 'lime'; did you mean 'line'",
        ),
        ("evaluators.simulator.env.replam=2", r"unknown key.*replan"),
        ("evaluators.simulator.timeout_seconds=6000", r"must be below trainer\.timeout_seconds"),
        ("evaluators.simulator.source='left'", r"left"),
    ],
)
def test_mistakes_are_found_before_the_first_step(configure_toy, override, message):
    with pytest.raises(UserError, match=message):
        configure_toy(*simulated(), override)


@pytest.mark.slow
def test_two_ranks_divide_the_episodes_and_give_the_same(tmp_path, start_ranks, train_toy):
    """One rank gets fewer episodes, and computes along with the other until both have finished."""
    config = tmp_path / "toy.toml"
    config.write_text(toy_policy.CONFIG)
    options = [*simulated(names=["right", "again", "and again"]), "evaluators.simulator.baselines=['idle']"]
    options += ["evaluators.simulator.episodes=1", "runner.max_steps=2"]
    result = start_ranks("simulator_ranks:main", 2, tmp_path / "two", config, *options)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    alone = train_toy(*options).run.folder
    found, jerks = [], []
    for folder in (alone, tmp_path / "two"):
        lines = (folder / "evaluations/simulator/step_000000002/episodes.jsonl").read_text().splitlines()[1:]
        results = [Result.model_validate_json(line) for line in lines]
        plain = {"seconds": 0.0, "video": "", "best_reward": 0.0, "jerk": 0.0}
        found.append([one.model_copy(update=plain) for one in results])
        jerks.append([one.jerk for one in results])
    assert len(found[0]) == 3 + 3
    assert found[0] == found[1]
    assert jerks[0] == pytest.approx(jerks[1], rel=1e-4)  # Batches of other sizes round differently.


def test_a_run_without_actions_cannot_be_simulated(configure_toy, monkeypatch):
    monkeypatch.setattr(toy_policy.TrainableToyPolicy, "chunk_length", lambda self: 0)
    with pytest.raises(UserError, match="has no actions: it cannot act in a simulator"):
        configure_toy(*simulated())
    assert issubclass(PluginError, UserError)
