"""`rlinf validate`: what is known of a run before it starts, every mistake at once, and no torch."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from distributions import entry_point, install, repository_entry_points, repository_plugins
from huggingface_hub import constants
from safetensors.numpy import save_file
from saved_run import checkpoint

from rlinf_core import PolicyConfig, UserError, cli, hookimpl
from rlinf_core.config.load import dump_config, load_config
from rlinf_core.plugins.registry import PLUGIN_GROUP, Plugins
from rlinf_core.preflight import Report
from rlinf_plugins_openpi import Pi05Config
from rlinf_plugins_openpi.weights.names import published_names
from rlinf_plugins_openpi.weights.shapes import table_shapes

ROOT = Path(__file__).parents[2]
QUICKSTART = "examples/quickstart.toml"


@pytest.fixture
def validate(monkeypatch, capsys, tmp_path):
    """Run the command on the quickstart; returns (exit code, the JSON it printed)."""

    def validate(*arguments, plugins=None):
        monkeypatch.setattr("rlinf_core.plugins.registry.get_plugins", lambda: plugins or repository_plugins())
        code = cli.main(["validate", QUICKSTART, f"runner.output_dir={tmp_path}", "--json", *arguments])
        return code, json.loads(capsys.readouterr().out)

    return validate


@pytest.fixture
def findings(validate):
    def findings(*arguments, **options):
        code, found = validate(*arguments, **options)
        assert (code, found["ok"]) == (2, False)
        return found["findings"]

    return findings


@pytest.fixture
def weights(tmp_path):
    """A file with the names and shapes of π0.5's weights; only headers are looked at."""
    policy = Pi05Config(variant="dummy", action_dim=4)
    path = tmp_path / "weights" / "model.safetensors"
    path.parent.mkdir()
    save_file(tensors(policy.dimensions), path)
    return path


def tensors(dimensions):
    shapes = table_shapes(dimensions)
    return {name: np.zeros(shapes[own], np.float32) for own, name in published_names(dimensions).items()}


def test_a_sound_run_is_told_in_facts_without_torch(tmp_path, weights):
    code = "import sys; from rlinf_core.cli import main; code = main(sys.argv[1:]); assert 'torch' not in sys.modules"
    command = [sys.executable, "-c", f"{code}; sys.exit(code)", "validate", QUICKSTART]
    command += [f"runner.output_dir={tmp_path / 'runs'}", "--ranks", "2", f"policy.weights={weights}"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    rows = [line.split(maxsplit=1) for line in result.stdout.splitlines()]
    assert rows[0] == ["ok", QUICKSTART]
    assert ["training", "rows         1607"] in rows
    assert not (tmp_path / "runs").exists()


def test_facts_as_json(validate):
    code, found = validate("--ranks", "2", "runner.loggers=['jsonl']")
    assert (code, found["ok"], found["config"], found["findings"]) == (0, True, QUICKSTART, [])
    facts = found["facts"]
    assert (facts["training_rows"], facts["training_episodes"]) == (1607, 92)
    assert (facts["held_out_rows"], facts["held_out_episodes"]) == (285, 16)
    assert (facts["ranks"], facts["micro_batches_a_step"]) == (2, 1)
    assert (facts["steps_an_epoch"], facts["steps"], facts["epochs"]) == (50, 1100, 22)
    assert "actions [5, 4]" in facts["sample"]
    assert "noise [5, 4]" in facts["sample"]
    assert facts["prompts"].startswith("0 of 3 different prompts cut to policy.max_token_len = 200, the longest has 12")
    assert (facts["weights"], facts["starts"], facts["launcher"]) == ("initial values", "at step 0", "torchrun")
    assert facts["loggers"] == "console, jsonl"
    assert facts["compiled_blocks"] == "no, on the CPU"


def test_every_problem_is_found_at_once(findings, tmp_path):
    (tmp_path / "quickstart").mkdir()
    (tmp_path / "quickstart" / "notes.txt").touch()
    found = findings(
        "--ranks=3",
        "data.images.base_0_rgb=camera",
        "data.state=['velocity']",
        "policy.weights=nowhere",
        "policy.tokenizer=nowhere.model",
        "cluster.launcher=torchrnu",
    )
    assert len(found) == 5
    columns, batch, files, folder, launcher = found
    assert "data.images.base_0_rgb names 'camera'" in columns
    assert "data.state names 'velocity'" in columns
    assert "32 is not a multiple of 3 ranks" in batch
    assert "policy.weights: there is no file or folder nowhere" in files
    assert "no tokenizer model at 'nowhere.model'" in files
    assert "is not empty and holds no run" in folder
    assert launcher.startswith(
        "no installed plugin launches with cluster.launcher = 'torchrnu'; did you mean 'torchrun'?"
    )


def test_what_two_checks_meet_is_said_once(findings):
    (found,) = findings("policy.tokenizer=nowhere.model", "policy.weights=nowhere")
    assert found.count("no tokenizer model at 'nowhere.model'") == 1
    assert "policy.weights: there is no file or folder nowhere" in found
    (found,) = findings("policy.tokenizer=nowhere.model")
    assert found.startswith("there is no tokenizer model at 'nowhere.model'")


def test_a_best_metric_that_no_validation_reports_is_found(validate, findings):
    wanted = ["runner.val_check_interval=10", "runner.save_best=true"]
    (found,) = findings(*wanted, "runner.best_metric=ema_val_action_mse", "optim.ema_decay=0")
    assert "reports no 'ema_val_action_mse'; did you mean 'val_action_mse'" in found
    for name in ("val_loss", "val_action_mse", "ema_val_action_mse"):
        assert validate(*wanted, f"runner.best_metric={name}", "optim.ema_decay=0.9")[0] == 0


def test_the_name_of_a_source_stands_in_the_facts_as_it_is_written(capsys, monkeypatch):
    report = Report({"training_rows": 1, "franka_pick: training_rows": 2})
    monkeypatch.setattr("rlinf_core.commands.validate._check", lambda options: report)
    assert cli.main(["validate", "run.toml"]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == [
        "training rows               1",
        "franka_pick: training rows  2",
    ]


def test_problems_are_listed_for_people(validate, monkeypatch, capsys):
    monkeypatch.setattr("rlinf_core.plugins.registry.get_plugins", repository_plugins)
    code = cli.main(["validate", QUICKSTART, "--ranks=3", "data.state=['a','b']"])
    out, error = capsys.readouterr()
    assert (code, out) == (2, "")
    assert [line[:29] for line in error.splitlines()] == [
        "error: examples/quickstart.to",
        "  data.state names 'a', which",
        "  data.state names 'b', which",
        "  trainer.global_batch_size =",
    ]
    assert "quickstart.toml would not run:" in error


def test_mistakes_of_the_config_come_first_a_plugins_among_them(findings, tmp_path, monkeypatch):
    arm = """
        from pydantic import BaseModel, ConfigDict
        from rlinf_core import hookimpl

        class Arm(BaseModel):
            model_config = ConfigDict(extra="forbid")
            speed: float = 1.0

        @hookimpl
        def rlinf_register_options():
            return {"arm": Arm}
    """
    install(tmp_path, "acme-arm", plugins={"arm": "acme_arm"}, acme_arm=arm)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "acme_arm", None)  # So that the module goes when the test does.
    del sys.modules["acme_arm"]
    plugins = Plugins([*repository_entry_points(), entry_point(PLUGIN_GROUP, "arm", "acme_arm", "acme-arm")])
    (found,) = findings("optim.lrr=1", "policy.variannt='dummy'", "plugins.arm.sped=2", plugins=plugins)
    assert "3 mistakes in the config" in found
    for mistake in ("optim.lrr: unknown key", "did you mean 'variant'?", "plugins.arm.sped: unknown key"):
        assert mistake in found
    assert "did you mean 'speed'?" in found


def test_a_plugin_may_refuse(findings):
    class Picky:
        @hookimpl
        def rlinf_configure(self, run):
            raise UserError(f"{run.runner.name} is not allowed here")

    found = findings(
        plugins=Plugins([*repository_entry_points(), entry_point(PLUGIN_GROUP, "picky", Picky(), "picky")])
    )
    assert len(found) == 1
    assert "quickstart is not allowed here [rlinf_configure of picky 1.0" in found[0]


def test_the_placement_says_how_many_ranks_there_are(validate, findings):
    assert validate("cluster.component_placement.actor=0-1")[1]["facts"]["ranks"] == 2
    facts = validate("trainer.micro_batch_size=8")[1]["facts"]
    assert (facts["ranks_that_fit"], "ranks" in facts) == ("1, 2, 4", False)
    two = ["cluster.num_nodes=2", "cluster.rdzv_endpoint=node0:29500"]
    assert validate("trainer.micro_batch_size=8", *two)[1]["facts"]["ranks_that_fit"] == "2, 4"
    assert "is not a multiple of 2 ranks" in findings("trainer.micro_batch_size=32", *two)[0]
    assert (
        "asks for 2 processes, but 1 were started" in findings("--ranks=1", "cluster.component_placement.actor=0-1")[0]
    )


def test_rows_that_fill_no_step_are_a_problem(findings):
    assert "has 1607 rows, fewer than" in findings("trainer.global_batch_size=1616")[0]


def test_a_sample_that_the_policy_cannot_take_names_its_row(findings):
    (found,) = findings("policy.action_dim=2")
    assert "`state` has 4 numbers, the policy takes at most 2" in found
    assert "episode 0, frame 0]" in found


def test_given_statistics_are_read(validate, findings, tmp_path):
    vector = {"mean": [0.0] * 4, "std": [1.0] * 4, "q01": [-1.0] * 4, "q99": [1.0] * 4}
    path = tmp_path / "norm_stats.json"
    path.write_text(json.dumps({"norm_stats": {"state": vector, "actions": vector}}))
    assert validate(f"data.norm_stats={path}")[0] == 0
    path.write_text(json.dumps({"norm_stats": {"state": vector, "actions": {k: v[:3] for k, v in vector.items()}}}))
    assert "'actions' have 3 numbers, the data have 4" in findings(f"data.norm_stats={path}")[0]
    assert "cannot be read" in findings("data.norm_stats=nowhere.json")[0]
    assert "cannot be read" in findings("data.norm_stats=nowhere.json", "data.stats_need_images=true")[0]
    assert validate("data.stats_need_images=true")[1]["facts"]["sample"] == "not tried: data.stats_need_images"


def test_the_doctors_findings_are_told(validate, findings, tmp_path):
    vector = {"mean": [0.0] * 4, "std": [1.0] * 4, "q01": [-1.0] * 4, "q99": [1.0] * 4}
    path = tmp_path / "norm_stats.json"
    path.write_text(json.dumps({"norm_stats": {"state": vector | {"q99": [1.0, 1.0, 1.0, -1.0]}, "actions": vector}}))
    code, found = validate(f"data.norm_stats={path}")
    assert (code, found["findings"]) == (0, [])
    (warning,) = [text for text in found["warnings"] if text.startswith("no-spread: state [3: gripper_opening]: ")]
    assert "data.norm_floor = " in warning
    wrong = vector | {"q99": [1.0, 1.0, 1.0, -2.0]}
    path.write_text(json.dumps({"norm_stats": {"state": wrong, "actions": vector}}))
    assert (
        "negative-spread: state [3: gripper_opening]: q99 is smaller than q01" in findings(f"data.norm_stats={path}")[0]
    )


def test_the_splits_are_told_in_a_line(validate):
    data = validate("data.tasks=['Push the puck to a goal',0]", "data.episodes=['0-49']")[1]["facts"]["data"]
    assert data == "28 episodes of 2 tasks, 460 rows; held out: 5 episodes of 2 tasks, 80 rows"


def test_what_becomes_of_a_run_that_is_there(validate, findings, tmp_path):
    run = load_config(ROOT / QUICKSTART, [f"runner.output_dir={tmp_path}"], repository_plugins())
    checkpoint(run, 550)
    (run.folder / "config.toml").write_text(dump_config(run))
    assert validate()[1]["facts"]["starts"] == "from checkpoint step_000000550"
    assert validate("runner.max_steps=550")[1]["facts"]["starts"] == "from checkpoint step_000000550, finished"
    assert "optim.lr: 0.0015 -> 0.001" in findings("optim.lr=1e-3")[0]
    assert "runner.resume is 'never'" in findings("runner.resume=never")[0]
    changed = validate("optim.lr=1e-3", "--allow-change")[1]["facts"]["goes_on_with_another_config"]
    assert changed == "optim.lr: 0.0015 -> 0.001 (changes what a step computes)"


def test_a_folder_for_checkpoints_that_cannot_be_is_a_finding(findings, tmp_path):
    (tmp_path / "file").touch()
    assert "file is not a folder" in findings(f"runner.checkpoint_dir={tmp_path / 'file'}")[0]


def test_weights_that_may_be_on_the_hub_are_told_to_be_unchecked(validate, findings, monkeypatch):
    (finding,) = findings("policy.weights=lerobot/nothere")
    assert "it is not in the cache and cannot be downloaded: HF_HUB_OFFLINE is set" in finding
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    (warning,) = [text for text in validate("policy.weights=lerobot/nothere")[1]["warnings"] if "weights" in text]
    assert warning.startswith("policy.weights: lerobot/nothere is not checked: there is no such file or folder")
    (finding,) = findings("policy.weights=checkpoints/nothere")
    assert "no file or folder checkpoints/nothere" in finding
    assert "the name is a path's rather than a hub id's" in finding


def test_a_launcher_of_a_plugin_is_let_pass(validate):
    class Ray:
        @hookimpl
        def rlinf_launch(self, run):
            return 0

    plugins = Plugins([*repository_entry_points(), entry_point(PLUGIN_GROUP, "ray", Ray(), "acme-ray")])
    assert validate("cluster.launcher=ray", plugins=plugins)[1]["facts"]["launcher"] == "ray"


def test_a_misspelt_launcher_is_found_although_a_plugin_brings_others(validate):
    class Sky:
        @hookimpl
        def rlinf_launcher_names(self):
            return ["skyline"]

        @hookimpl
        def rlinf_launch(self, run):
            return 0

    plugins = Plugins([*repository_entry_points(), entry_point(PLUGIN_GROUP, "sky", Sky(), "acme-sky")])
    assert not validate("cluster.launcher=skyline", plugins=plugins)[1]["findings"]
    for name, meant in (("skylin", "skyline"), ("slrum", "slurm"), ("torchrum", "torchrun")):
        (finding,) = validate(f"cluster.launcher={name}", plugins=plugins)[1]["findings"]
        assert f"cluster.launcher = {name!r}; did you mean {meant!r}?" in finding
        assert "core provides 'torchrun' and 'slurm', acme-sky 'skyline'" in finding


@pytest.mark.parametrize("ranks", ["0", "two", "-1"])
def test_ranks_are_a_number(ranks, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["validate", QUICKSTART, f"--ranks={ranks}"])
    assert caught.value.code == 2
    assert "is not a number of processes" in capsys.readouterr().err


def test_a_policys_weights_are_a_path_unless_it_says_otherwise(tmp_path):
    for weights in ("", "random", str(tmp_path)):
        PolicyConfig(type="any", weights=weights).check_files()
    with pytest.raises(UserError, match=r"policy\.weights: there is no file or folder .*absent"):
        PolicyConfig(type="any", weights=str(tmp_path / "absent")).check_files()


def test_weights_of_another_model_are_told_by_their_names(weights):
    policy = {"variant": "dummy", "action_dim": 4, "weights": str(weights.parent)}
    Pi05Config(**policy).check_files()
    found = tensors(Pi05Config(variant="dummy", action_dim=4).dimensions) | {"surprise": np.zeros(1, np.float32)}
    del found["action_in_proj.bias"]
    save_file(found, weights)
    with pytest.raises(UserError, match=r"(?s)1 missing, 1 unexpected, 0 misshapen.*policy\.variant") as caught:
        Pi05Config(**policy).check_files()
    assert "missing: action_in_proj.bias" in str(caught.value)
    assert "unexpected: surprise" in str(caught.value)


def test_a_vocabulary_that_does_not_fit_is_found_before_the_model_is_built(monkeypatch):
    monkeypatch.setattr("rlinf_plugins_openpi.config.load_processor", lambda _: SimpleNamespace(vocab_size=lambda: 513))
    with pytest.raises(UserError, match=r"has 513 entries, variant dummy embeds 512: set policy\.tokenizer"):
        Pi05Config(variant="dummy").check_files()


def test_ok_counts_what_may_spoil_the_run(capsys, tmp_path):
    changes = ["--ranks=2", "policy.discrete_state_input=true", "policy.max_token_len=20"]
    assert cli.main(["validate", QUICKSTART, f"runner.output_dir={tmp_path}", *changes]) == 0
    said = " ".join("".join(capsys.readouterr()).split())
    assert said.startswith(f"ok, 1 warning {QUICKSTART}")
    warning = r"warning: the state and `Action:` are cut away in (\d+) of \1 prompts: set policy\.max_token_len = \d+ "
    assert re.search(warning, said)
