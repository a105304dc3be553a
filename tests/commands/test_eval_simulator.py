"""`rlinf eval --env` through the command: a run and an exported folder of the small π0.5 in a toy simulator."""

import json

import pytest
import toy_simulator
from distributions import entry_point, repository_entry_points

from rlinf_core import cli
from rlinf_core.plugins import registry
from rlinf_core.plugins.registry import PLUGIN_GROUP, Plugins
from rlinf_core.results import read_table
from rlinf_core.training.distributed.processes import processes
from rlinf_core.training.run_folder import prepare_folder

SETTINGS = [
    *("runner.max_steps=1", "runner.val_check_interval=1", "runner.val_samples=2", "runner.evaluators=['simulator']"),
    *("trainer.global_batch_size=2", "trainer.micro_batch_size=2", "data.num_workers=0"),
    "evaluators.simulator.env={type = 'sawyer', replan = 2, action_repeat = 4, horizon = 16}",
    *("evaluators.simulator.tasks=['reach']", "evaluators.simulator.episodes=1", "evaluators.simulator.baselines=[]"),
]


@pytest.fixture(scope="module", autouse=True)
def plugins():
    found = Plugins([*repository_entry_points(), entry_point(PLUGIN_GROUP, "line", toy_simulator, "line")])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "get_plugins", lambda: found)
        yield found


@pytest.fixture(scope="module")
def folder(tmp_path_factory, plugins):
    from rlinf_core.config.load import load_config

    output = f"runner.output_dir={tmp_path_factory.mktemp('runs')}"
    run = load_config("examples/quickstart.toml", [output, *SETTINGS], plugins)
    with pytest.MonkeyPatch.context() as patch, processes("cpu") as group:
        patch.delenv("RANK", raising=False)
        start = prepare_folder(run, overwrite=False)
        run.trainer.build(run, start=start, group=group, plugins=plugins).train()
    return run.folder


def evaluated(capsys, *arguments):
    code = cli.main(["eval", *map(str, arguments), "--json"])
    out, err = capsys.readouterr()
    assert code == 0, err
    return json.loads(out)


def test_a_run_plays_as_its_own_evaluator_did_beside_what_luck_gives(folder, capsys):
    result = evaluated(capsys, folder, "--env", "sawyer", "--episodes", "2", "--processes", "1")
    assert result["settings"]["env"] | {"replan": 2, "action_repeat": 4, "horizon": 16} == result["settings"]["env"]
    assert result["settings"]["tasks"] == ["reach"]
    assert result["facts"] == {"sawyer": "1.0"}
    agents = [one["agent"] for one in result["episodes"]]
    assert agents == ["policy"] * 2 + ["idle"] * 2 + ["random"] * 2 + ["replay"] * 2
    assert all(one["steps"] == 16 or one["ever"] for one in result["episodes"])
    assert result["table"]["columns"][:2] == ["task", "success"]
    [kept] = (folder / "evaluations" / "sawyer" / "step_000000001").iterdir()
    assert read_table(kept / "success.table.json").rows[0][-1] == 2
    assert len((kept / "episodes.jsonl").read_text().splitlines()) == 9


def test_more_episodes_continue_and_an_exported_folder_remembers_the_environment(folder, tmp_path, capsys, monkeypatch):
    assert cli.main(["export", str(folder), "--output", str(tmp_path / "policy")]) == 0
    capsys.readouterr()
    output = tmp_path / "result.json"
    arguments = [tmp_path / "policy", "--env", "sawyer", "--output", output, "--baselines", "none"]
    first = evaluated(capsys, *arguments, "--episodes", "1")
    again = evaluated(capsys, *arguments, "--episodes", "2")
    assert [one["number"] for one in again["episodes"]] == [0, 1]
    assert again["episodes"][0] == first["episodes"][0]  # With its wall time: it was not played again.
    assert json.loads(output.read_text()) == again
    assert again["settings"]["env"]["action_repeat"] == 4
    videos = tmp_path / "result_episodes" / "videos"
    assert {path.name for path in videos.iterdir()} == {
        one["video"].removeprefix("videos/") for one in again["episodes"] if one["video"]
    }
    assert cli.main(["eval", *map(str, arguments), "--seed", "3"]) == 2
    err = capsys.readouterr().err
    assert "has episodes of another evaluation (seed was 100000, now 3)" in err
    assert "name another place with --output" in err


def test_tasks_without_demonstrations_are_not_replayed_and_the_table_is_printed(folder, capsys):
    options = ["--tasks", "wave,0", "--episodes", "1", "--set", "env.horizon=4", "--videos", "0", "--replan", "1"]
    assert cli.main(["eval", str(folder), "--env", "sawyer", *options]) == 0
    out = capsys.readouterr().out
    assert "no blind replay of 'Wave': the dataset has no episode with this instruction" in out
    [wave] = [line for line in out.splitlines() if line.startswith("wave ")]
    [reach] = [line for line in out.splitlines() if line.startswith("reach ")]
    assert wave.count("(") == reach.count("(") - 1
    assert "95 % Wilson intervals" in out


def test_a_fault_is_one_message(folder, tmp_path, capsys):
    output = tmp_path / "result.json"
    arguments = ["eval", str(folder), "--env", "sawyer", "--episodes", "1", "--baselines", "none", "--videos", "0"]
    arguments += ["--tasks", "0,1", "--output", str(output), "--processes", "1"]
    assert cli.main([*arguments, "--set", "env.fault=raise:step"]) == 2
    err = capsys.readouterr().err
    assert "environment 'sawyer', task 'reach', episode 0 of policy (seed 100000): step() failed: ValueError" in err
    assert not output.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--env", "sawer"], "unknown environment 'sawer'; did you mean 'sawyer'"),
        (["--env", "sawyer", "--tasks", "raech"], "has no task 'raech'; did you mean 'reach'"),
        (["--env", "sawyer", "--set", "env.replam=3", "--processes", "0"], "2 of its settings are invalid"),
        (["--env", "sawyer", "--set", "replan"], "is not an override"),
        (["--env", "sawyer", "--episodes", "0-3"], "is a number, of episodes per task"),
        (["--env", "sawyer", "--baselines", "lucky"], "'idle', 'random' or 'replay'"),
        (["--env", "sawyer", "--split", "train"], "--split is for recorded episodes"),
        (["--tasks", "reach"], "--tasks is for a simulator: add --env NAME"),
        (["--env", "sawyer", "--dataset", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_one_message(folder, arguments, message, capsys):
    assert cli.main(["eval", str(folder), *arguments]) == 2
    assert message in capsys.readouterr().err
