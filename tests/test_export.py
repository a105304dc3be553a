"""`rlinf export` and `load_policy`: what leaves a run acts as the run's own policy did."""

import json
import re
import shutil
import tomllib
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from rlinf_core import UserError, cli, open_rows
from rlinf_core.config.load import load_config
from rlinf_core.config.toml import write_toml
from rlinf_core.data.loading.sampling import validation_generator
from rlinf_core.data.normalize import load_norm_stats
from rlinf_core.evaluators.action_error import ActionComparison
from rlinf_core.inference import OutsideTraining, load_policy
from rlinf_core.plugins.registry import get_plugins
from rlinf_core.publish.folder import check_folder
from rlinf_core.results import read_action_errors, read_table
from rlinf_core.training.distributed.processes import processes
from rlinf_core.training.run_folder import prepare_folder
from rlinf_plugins_openpi.model.parts import unpacked
from rlinf_plugins_openpi.weights.names import UNUSED, published_names

SETTINGS = [
    *("runner.max_steps=4", "runner.save_interval=2", "runner.val_check_interval=2", "runner.save_best=true"),
    *("runner.val_samples=6", "trainer.global_batch_size=4", "trainer.micro_batch_size=4", "optim.ema_decay=0.5"),
    *("data.num_workers=0", "policy.action_dim=8", "optim.warmup_steps=0"),
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of four steps of the dummy π0.5: the trainer, its last weights, and what its last validation acted."""
    folder = tmp_path_factory.mktemp("runs")
    run = load_config("examples/quickstart.toml", [f"runner.output_dir={folder}", *SETTINGS])
    acted = {"live": {}, "ema": {}}
    with pytest.MonkeyPatch.context() as patch, processes("cpu") as group:
        patch.delenv("RANK", raising=False)
        start = prepare_folder(run, overwrite=False)
        trainer = run.trainer.build(run, start=start, group=group, plugins=get_plugins())
        [held_out] = trainer._evaluations.running
        evaluate, compare = held_out.evaluator.evaluate, ActionComparison.compare
        turn = iter(["live", "ema"] * 2)

        def noted_evaluate(policy, **arguments):
            trainer.measuring = next(turn)
            return evaluate(policy, **arguments)

        def noted_compare(self, actions, row):
            acted[trainer.measuring][row.row] = trainer.data.sources[0].pipeline.decode(actions, row.sample)
            return compare(self, actions, row)

        patch.setattr(held_out.evaluator, "evaluate", noted_evaluate)
        patch.setattr(ActionComparison, "compare", noted_compare)
        trainer.train()
        source = trainer.data.for_evaluators(group).sources[0]
        with torch.no_grad():
            generators = [validation_generator(run.seed, row) for row in (0, 1)]
            trainer.acted = source.act(trainer.policy, source.held_out.__getitems__([0, 1]), generators)
        live = {name: p.detach().full_tensor().clone() for name, p in trainer.policy.named_parameters()}
    return trainer, live, acted


@pytest.fixture
def export(trained, tmp_path, capsys):
    """Run `rlinf export` on the run; returns the exit code, the folder and what was said."""

    def export(*options, name="policy"):
        output = tmp_path / name
        code = cli.main(["export", str(trained[0].run.folder), "--output", str(output), *options])
        return code, output, "".join(capsys.readouterr())

    return export


@pytest.mark.parametrize("weights", ["live", "ema"])
def test_the_exported_policy_acts_as_the_trainers_validation_did(trained, export, weights):
    trainer, _, acted = trained
    code, folder, _ = export(*["--ema"] * (weights == "ema"))
    assert code == 0
    policy = load_policy(folder)
    held_out = open_rows(trainer.run, split="validation")
    assert len(acted[weights]) == 6
    for row, actions in acted[weights].items():
        noise = trainer.run.policy.draw(validation_generator(trainer.run.seed, row))["noise"]
        seen = {key: value for key, value in held_out[row].items() if not key.startswith("action")}
        np.testing.assert_allclose(policy.infer(seen, noise), actions, rtol=1e-5, atol=1e-6)
    if weights == "live":  # As a simulator in training acts, observations together in a batch.
        for row, actions in enumerate(trainer.acted):
            noise = trainer.run.policy.draw(validation_generator(trainer.run.seed, row))["noise"]
            np.testing.assert_allclose(policy.infer(held_out[row], noise), actions, rtol=1e-4, atol=1e-5)


def test_files_and_hashes(trained, export):
    _, folder, said = export()
    there = sorted(path.name for path in folder.iterdir())
    assert there == ["README.md", "model.safetensors", "norm_stats.json", "rlinf.json"]
    description = json.loads((folder / "rlinf.json").read_text())
    assert (description["step"], description["weights"], description["dtype"]) == (4, "live", "fp32")
    assert description["sha256"].keys() == {"model.safetensors", "norm_stats.json"}
    assert check_folder(folder).problems == []
    assert "weights of" in said


def test_the_file_holds_the_weights_to_the_bit_in_its_own_dtype(trained, export):
    trainer, live, _ = trained
    tensors = unpacked(live, trainer.run.policy.dimensions)
    names = {published: name for name, published in published_names(trainer.run.policy.dimensions).items()}
    for dtype in ("fp32", "bf16"):
        stored = load_file(export("--dtype", dtype, name=dtype)[1] / "model.safetensors")
        for head in UNUSED:
            assert not stored.pop(head).any()
        for key, tensor in stored.items():
            own = names.get(key, "embedding.weight")
            assert torch.equal(tensor, tensors[own].to(tensor.dtype)), key
        assert {tensor.dtype for tensor in stored.values()} == {torch.float32 if dtype == "fp32" else torch.bfloat16}


def test_an_exported_folder_is_weights_to_start_from(trained, export):
    trainer, live, _ = trained
    _, folder, _ = export()
    weights = trainer.run.policy.model_copy(update={"weights": str(folder)}).open_weights()
    weights.check({name: tuple(tensor.shape) for name, tensor in live.items()})
    assert all(torch.equal(weights.tensor(name), tensor) for name, tensor in live.items())
    stats = load_norm_stats(trainer.run.folder / "norm_stats.json")
    for kind in ("rlinf", "openpi"):  # What is beside the weights does not contradict the run that they are from.
        folder = export("--format", kind, name=kind)[1]
        policy = trainer.run.policy.model_copy(update={"weights": str(folder)})
        assert policy.contradictions(trainer.run.data, stats) == ()


def test_a_run_is_exported_without_the_simulators_and_trackers_of_its_training(trained, tmp_path):
    shutil.copytree(trained[0].run.folder, run := tmp_path / "elsewhere")
    config = tomllib.loads((run / "config.toml").read_text())
    config["runner"] |= {"loggers": ["far_away"], "evaluators": ["simulator"]}
    config["evaluators"] = {"simulator": {"env": {"type": "no_longer_installed"}}}
    config["loggers"] = {"far_away": {"project": "arm"}}
    (run / "config.toml").write_text(write_toml(config))
    with pytest.raises(UserError, match=r"2 mistakes .*(?s:.*)far_away(?s:.*)no_longer_installed"):
        load_config(run / "config.toml")
    assert cli.main(["export", str(run), "--output", str(tmp_path / "folder")]) == 0
    assert load_policy(tmp_path / "folder").data.config_name == trained[0].run.data.config_name
    described = json.loads((tmp_path / "folder" / "rlinf.json").read_text())
    assert described["simulator"] == {"env": {"type": "no_longer_installed"}}


def test_openpi_finds_weights_and_statistics_where_it_looks(trained, export):
    trainer, live, _ = trained
    code, folder, _ = export("--format", "openpi")
    assert code == 0
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()) == [
        "README.md",
        "SHA256SUMS",
        "assets/metaworld_3tasks/norm_stats.json",
        "model.safetensors",
    ]
    checked = check_folder(folder)
    assert (checked.problems, checked.card["library_name"]) == ([], "openpi")
    assert "`metaworld_3tasks`" in (folder / "README.md").read_text()  # The asset id that openpi's config must have.
    weights = trainer.run.policy.model_copy(update={"weights": str(folder)}).open_weights()
    assert all(torch.equal(weights.tensor(name), tensor) for name, tensor in live.items())


def test_the_card_has_what_was_measured_of_the_exported_weights(trained, export, tmp_path):
    metrics = {}
    for line in (trained[0].run.folder / "metrics.jsonl").read_text().splitlines():
        metrics |= json.loads(line) if json.loads(line)["step"] == 4 else {}
    table = {"title": "Success in metaworld", "columns": ["task", "success", "episodes"]}
    rate = {"value": 0.75, "low": 0.531, "high": 0.888}
    result = {"step": 4, "weights": "ema", "settings": {"env": {"type": "metaworld"}}, "facts": {"mujoco": "3.3.0"}}
    file = tmp_path / "result.json"
    file.write_text(json.dumps(result | {"table": table | {"rows": [["reach-v3", rate, 20]]}}))
    code, folder, _ = export("--ema", "--results", str(file), "--license", "mit")
    assert code == 0
    text = (folder / "README.md").read_text()
    assert f"| `val_loss` | {metrics['ema_val_loss']:.4g} |" in text
    assert "| reach-v3 | 0.75 (0.531 to 0.888) | 20 |" in text
    assert "Measured by `rlinf eval --env metaworld`, with mujoco 3.3.0." in text
    code, _, said = export("--results", str(file), name="live")
    assert (code, "is of other weights: step 4, ema; exported are those of step 4, live" in said) == (2, True)
    assert not (tmp_path / "live").exists()


def test_a_checkpoint_is_chosen_by_step_or_by_validation(trained, export):
    trainer, *_ = trained
    assert json.loads((export("--step", "2")[1] / "rlinf.json").read_text())["step"] == 2
    best = int((trainer.run.folder / "best").read_text().removeprefix("step_"))
    assert json.loads((export("--best", name="best")[1] / "rlinf.json").read_text())["step"] == best


def test_the_weights_that_won_the_validation_are_exported_and_named(trained, export):
    assert trained[0]._best.metric == "ema_val_action_mse"
    for options, weights, said in [
        (("--best",), "ema", rf"\(EMA\), chosen by ema_val_action_mse = {trained[0]._best.value:.4g} at step"),
        (("--best", "--no-ema"), "live", "weights: live, not those that were chosen by ema_val_action_mse"),
        (("--ema",), "ema", "moving average \\(EMA\\); --no-ema exports the live weights"),
        ((), "live", "weights: live; the run also keeps a moving average \\(EMA\\), which --ema exports"),
    ]:
        _, folder, output = export(*options, name=f"policy{'-'.join(options)}")
        assert json.loads((folder / "rlinf.json").read_text())["weights"] == weights
        assert re.search(said, " ".join(output.split())), output


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--step", "3"], "has no checkpoint of step 3 (available: 2, 4)"),
        (["--format", "lerobott"], "has no export format 'lerobott'"),
    ],
)
def test_what_is_not_there_is_said_and_nothing_is_written(export, options, complaint):
    code, folder, said = export(*options)
    assert code == 2
    assert complaint in said
    assert not folder.exists()
    assert list(folder.parent.iterdir()) == []


def test_what_is_there_is_not_overwritten(export, tmp_path):
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "thesis.tex").write_text("x")
    code, _, said = export()
    assert code == 2
    assert "already exists and contains thesis.tex: name another --output" in said


def test_folders_that_were_not_exported_are_refused(export, tmp_path):
    with pytest.raises(UserError, match=r"rlinf\.json cannot be read .* is this a folder that `rlinf export` wrote\?"):
        load_policy(tmp_path)
    _, folder, _ = export()
    (folder / "rlinf.json").write_text("[]")
    with pytest.raises(UserError, match=r"cannot be read"):
        load_policy(folder)


def test_folders_for_others_are_recognised(trained, export, tmp_path):
    _, folder, _ = export("--format", "openpi")
    with pytest.raises(UserError, match=r"in openpi's format.* Export the run again without --format"):
        load_policy(folder)
    shutil.rmtree(folder / "assets")
    with pytest.raises(
        UserError, match=r"policy contains weights alone.*train from these weights with policy\.weights"
    ):
        load_policy(folder)
    (folder / "policy_preprocessor.json").touch()
    with pytest.raises(UserError, match=r"in lerobot's format"):
        load_policy(folder)
    with pytest.raises(UserError, match=r"contains a run, not a policy: export it with `rlinf export "):
        load_policy(trained[0].run.folder)


def test_observations_that_lack_something_say_what(trained, export):
    policy = load_policy(export()[1])
    with pytest.raises(UserError, match=r"lacks 'observation\.image', 'observation\.state'; it has task"):
        policy.infer({"task": "push"})
    image, state = np.zeros((64, 64, 3), np.uint8), np.zeros(4, np.float32)
    with pytest.raises(UserError, match=r"lacks 'observation\.image'.*did you mean 'observation\.img'\?"):
        policy.infer({"observation.img": image, "observation.state": state, "task": "push"})
    row = {"observation.image": image, "observation.state": state, "task": "push", "action": np.zeros(4), "index": 3}
    assert policy.infer(row).shape == (policy.config.chunk_length(), 4)


def test_an_observation_unlike_those_of_training_is_refused(export):
    folder = export()[1]
    description = json.loads((folder / "rlinf.json").read_text())
    description["data"]["state_width"] = 0  # As in a format that leaves the width to the data.
    (folder / "rlinf.json").write_text(json.dumps(description))
    policy = load_policy(folder)
    seen = {"observation.image": np.zeros((64, 64, 3), np.uint8), "observation.state": np.zeros(4), "task": "push"}
    for key, value, message in [
        ("observation.state", np.zeros(3), r"has shape \[3\] .*, in training it was \[4\]"),
        ("observation.state", np.zeros((1, 4)), r"has shape \[1, 4\]"),
        ("observation.state", np.full(4, np.nan), "contains NaN or infinity"),
        ("task", ["push"], r"'task' is \['push'\], but must be a string"),
        ("observation.image", [[0]], "camera 'base_0_rgb' is a list: images are NumPy arrays"),
    ]:
        with pytest.raises(UserError, match=message):
            policy.infer(seen | {key: value})


def reports(policy, observation, *, error=""):
    """The warnings of an observation, without what is in brackets."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if error:
            with pytest.raises(UserError, match=error):
                policy.infer(observation)
        else:
            policy.infer(observation)
    assert all(one.category is OutsideTraining and one.filename == __file__ for one in caught)
    return [str(one.message) for one in caught]


def test_the_robot_is_held_to_what_training_saw(trained, export):
    folder = export()[1]
    rows = open_rows(trained[0].run)
    row = rows[0]
    policy = load_policy(folder)
    assert reports(policy, row) == []
    (finer,) = reports(policy, row | {"observation.image": np.zeros((448, 448, 3), np.uint8)})
    assert "is 448 x 448 pixels, in training 224 x 224 pixels: its details are finer" in finer
    assert reports(policy, row | {"observation.image": np.zeros((480, 640, 3), np.uint8)}) == []  # It was said.
    states = np.stack([one["observation.state"] for one in rows[:]])
    far = states[0].copy()
    far[1] = 57.3  # Degrees instead of radians.
    (state,) = reports(policy, row | {"observation.state": far})
    low, high = policy.coverage.state_low[1], policy.coverage.state_high[1]
    assert (low, high) == (pytest.approx(states[:, 1].min()), pytest.approx(states[:, 1].max()))
    assert f"[1] is 57.3, in training {low:.4g} to {high:.4g}" in state
    assert "of training: " not in state
    assert reports(policy, row | {"task": " "}, error="'task' is empty, but no task of the training data was") == []
    (task,) = reports(policy, row | {"task": "open the drawer and close it again"})
    assert re.match(r"the task has \d+ tokens, in training \d+ to 12 \(reported once\)", task)
    fresh = load_policy(folder)
    assert "another aspect ratio" in reports(fresh, row | {"observation.image": np.zeros((480, 640, 3), np.uint8)})[0]


def test_a_prompt_that_would_lose_its_state_is_refused(trained, export):
    folder = export()[1]
    description = json.loads((folder / "rlinf.json").read_text())
    description["policy"]["discrete_state_input"] = True
    description["policy"]["max_token_len"] = 60
    numbers = description["coverage"][""]["measured"]
    row = open_rows(trained[0].run)[0] | {"task": "open the drawer " * 20}
    for trained_to, error in ((40, r"with its state, and policy\.max_token_len = 60: the state .* Shorten"), (99, "")):
        numbers["tokens of the prompt"] = [30, trained_to]  # 99: training cut the state away, too.
        (folder / "rlinf.json").write_text(json.dumps(description))
        said = reports(load_policy(folder), row, error=error)
        assert ["the state and `Action:` at its end are cut away" in one for one in said] == [True] * (not error)


def test_folders_without_limits_act_as_before(trained, export):
    folder = export()[1]
    description = json.loads((folder / "rlinf.json").read_text())
    for coverage, complaint in (
        (None, ""),
        ({"": {"rows": 3, "of_a_later_version": 1}}, ""),
        ({"": {"images": 3}}, "its coverage is not valid"),
        ([1], "its coverage is not valid: it must be a table"),
    ):
        table = {key: value for key, value in description.items() if key != "coverage"}
        (folder / "rlinf.json").write_text(json.dumps(table | ({} if coverage is None else {"coverage": coverage})))
        if complaint:
            with pytest.raises(UserError, match=complaint):
                load_policy(folder)
        else:
            row = open_rows(trained[0].run)[0] | {"task": "", "observation.image": np.zeros((9, 99, 3), np.uint8)}
            assert reports(load_policy(folder), row) == []


def test_devices_dtypes_and_noise_that_do_not_exist_are_named(export):
    folder = export()[1]
    for options, complaint in (
        ({"device": "cuda:7"}, r"load_policy\(device='cuda:7'\): there is no such device here; there is cpu"),
        ({"device": "gpu"}, r"load_policy\(device='gpu'\): there is no such device here"),
        ({"dtype": "fp16"}, r"load_policy\(dtype='fp16'\): policies compute in 'bf16' or 'fp32'"),
    ):
        with pytest.raises(UserError, match=complaint):
            load_policy(folder, **options)
    policy = load_policy(folder, dtype=torch.float32)
    seen = {"observation.image": np.zeros((64, 64, 3), np.uint8), "observation.state": np.zeros(4), "task": "push"}
    for noise in (np.zeros((8, 5)), np.zeros((5, 8, 1)), np.full((5, 8), np.nan), "noise"):
        with pytest.raises(UserError, match=r"but must be finite numbers \[5, 8\]"):
            policy.infer(seen, noise)
    assert np.array_equal(policy.infer(seen, np.zeros((5, 8))), policy.infer(seen, np.zeros((5, 8), np.float32)))


def test_weights_with_nan_or_infinity_are_named_with_their_file(trained, export):
    folder = export()[1]
    file = folder / "model.safetensors"
    tensors = load_file(file)
    gate = next(key for key in tensors if "gate_proj" in key)
    tensors[gate][0, 0] = float("nan")
    up = gate.replace("gate_proj", "up_proj")
    tensors[up][1, :2] = float("inf")
    save_file(tensors, file)
    message = (
        rf"{file} contains numbers that are not finite: {gate} has 1 NaN of .*; {up} has 2 infinite of \d+ numbers"
    )
    with pytest.raises(UserError, match=message):
        load_policy(folder)


def evaluated(capsys, *arguments):
    code = cli.main(["eval", *map(str, arguments), "--samples", "6", "--json"])
    out, err = capsys.readouterr()
    assert code == 0, err
    return json.loads(out)


def test_rlinf_eval_measures_what_the_runs_validation_did(trained, export, capsys):
    """Of a run, of an exported folder, and of averaged weights; the run's folder gets the tables."""
    trainer = trained[0]
    rows = [json.loads(line) for line in (trainer.run.folder / "metrics.jsonl").read_text().splitlines()]
    validation = {row["step"]: row for row in rows if "val_action_mse" in row}[4]
    result = evaluated(capsys, trainer.run.folder)
    overall = {name: one["value"] for name, one in result["tables"]["overall"]["rows"]}
    assert overall["policy"] == pytest.approx(validation["val_action_mse"], rel=1e-4)
    assert overall["mean action"] == pytest.approx(validation["val_action_mse_mean"], rel=1e-4)
    assert overall["repeated action"] == pytest.approx(validation["val_action_mse_repeat"], rel=1e-4)
    assert (result["step"], result["weights"], result["rows"], result["seed"]) == (4, "live", 6, trainer.run.seed)
    ema = evaluated(capsys, trainer.run.folder, "--ema")
    [(_, one), *_] = ema["tables"]["overall"]["rows"]
    assert one["value"] == pytest.approx(validation["ema_val_action_mse"], rel=1e-4)
    folder = trainer.run.folder / "evaluations" / "offline"
    assert read_table(folder / "step_000000004" / "validation" / "overall.table.json").rows[0][0] == "policy"
    assert read_action_errors(folder / "ema_step_000000004" / "validation" / "actions.actions.json").rows == 6
    held_out = read_action_errors(trainer.run.folder / "evaluations/held_out/step_000000004/held_out.actions.json")
    assert np.allclose(held_out.rmse, result["errors"]["rmse"], rtol=1e-4)
    exported = evaluated(capsys, export()[1])
    assert exported["tables"] == result["tables"]
    assert exported["errors"] == result["errors"]


def test_rlinf_eval_of_other_episodes(trained, tmp_path, capsys):
    folder = trained[0].run.folder
    result = evaluated(capsys, folder, "--dataset", trained[0].run.data.repo_id, "--episodes", "0,2-3", "--seed", "7")
    assert [row[0] for row in sorted(result["tables"]["episodes"]["rows"])] == [0, 2, 3]
    output = tmp_path / "new" / "result.json"
    assert evaluated(capsys, folder, "--split", "train", "--output", output)["split"] == "train"
    assert json.loads(output.read_text())["rows"] == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "x", "--split", "train"], "leave it out with --dataset"),
        (["--episodes", "4000"], "there is no episode 4000 among these rows"),
        (["--dataset", "nowhere"], "nowhere"),
        (["--step", "3"], "has no checkpoint of step 3 (available: 2, 4)"),
        (["--device", "cuda:9"], "there is no such device"),
    ],
)
def test_rlinf_eval_refuses_in_one_message(trained, arguments, message, capsys):
    assert cli.main(["eval", str(trained[0].run.folder), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_rlinf_eval_of_an_exported_folder_has_one_checkpoint(export, capsys):
    folder = export()[1]
    assert cli.main(["eval", str(folder), "--best"]) == 2
    assert "--step, --best and --ema are of a run" in capsys.readouterr().err
    assert cli.main(["eval", str(folder / "nothing")]) == 2
    assert "there is no" in capsys.readouterr().err
