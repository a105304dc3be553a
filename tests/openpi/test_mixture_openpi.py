"""π0.5 on two robots at once: other cameras, numbers of joints and units; trained, resumed, exported, acting."""

import json

import numpy as np
import pytest
import torch
from distributions import repository_plugins

from rlinf_core import UserError, cli
from rlinf_core.config.load import load_config
from rlinf_core.data.loading.micro_batches import SOURCE
from rlinf_core.data.loading.sampling import validation_generator
from rlinf_core.data.normalize import load_norm_stats
from rlinf_core.data.sample import PACKING
from rlinf_core.data.statistics.preview import bind_policy
from rlinf_core.inference import load_policy
from rlinf_core.loggers.jsonl import read_rows
from rlinf_core.testing import write_tiny_dataset
from rlinf_core.training.distributed.processes import processes
from rlinf_core.training.run_folder import prepare_folder

CONFIG = """
[data]
num_workers = 0
[[data.mixture]]
name = "two_arms"
config_name = "pi05_custom"
repo_id = "{two_arms}"
weight = 2
images = {{ base_0_rgb = "front", left_wrist_0_rgb = "wrist" }}
state = ["joints", "hand"]
actions = ["action"]
raw_action_is_delta = false
gripper = [4]
validation_episodes = [1]
[[data.mixture]]
name = "gantry"
config_name = "pi05_custom"
repo_id = "{gantry}"
images = {{ right_wrist_0_rgb = "eye" }}
raw_action_is_delta = true
default_prompt = "go there"
prompt_from_task = false
validation_episodes = [0]
[policy]
variant = "dummy"
action_dim = 6
action_horizon = 4
mask_padded_dims = true
[optim]
warmup_steps = 0
[trainer]
device = "cpu"
param_dtype = "fp32"
global_batch_size = 6
micro_batch_size = 3
[runner]
max_steps = 4
save_interval = 2
val_check_interval = 4
val_samples = 3
"""


@pytest.fixture(scope="module")
def robots(tmp_path_factory):
    folder = tmp_path_factory.mktemp("robots")
    vectors = {"joints": 4, "hand": 1, "action": 5}
    write_tiny_dataset(folder / "two_arms", cameras=("front", "wrist"), vectors=vectors)
    write_tiny_dataset(folder / "gantry", cameras=("eye",), vectors={"state": 2, "actions": 2}, lengths=(6, 9), seed=1)
    return folder


def train(path, folder, *overrides, watch=lambda trainer: None):
    plugins = repository_plugins()
    run = load_config(path, [f"runner.output_dir={folder}", *overrides], plugins)
    with pytest.MonkeyPatch.context() as patch, processes("cpu") as group:
        patch.delenv("RANK", raising=False)
        trainer = run.trainer.build(run, start=prepare_folder(run, overwrite=False), group=group, plugins=plugins)
        watch(trainer)
        trainer.train()
    return trainer


@pytest.fixture(scope="module")
def config(robots):
    path = robots / "run.toml"
    path.write_text(CONFIG.format(two_arms=robots / "two_arms", gantry=robots / "gantry"))
    return path


def of_rows(batch, rows):
    """Some samples of a batch, which may have tables of tensors."""
    return {key: of_rows(value, rows) if isinstance(value, dict) else value[rows] for key, value in batch.items()}


@pytest.fixture(scope="module")
def trained(robots, config):
    """The trainer, and of its first step each source's loss when the policy sees that source's samples alone."""
    alone = {}

    def watch(trainer):
        batches = iter(trainer.data.loader(trainer._group, trainer.step))
        sums = {number: [0.0, 0.0] for number in range(2)}
        trainer.policy.train()
        for batch in (next(batches) for _ in range(2)):
            numbers = batch.pop(SOURCE)
            trainer.seen_cameras = max(getattr(trainer, "seen_cameras", 0), batch["images"].shape[1])
            for number in numbers.unique().tolist():
                own = of_rows({key: value for key, value in batch.items() if key != PACKING}, numbers == number)
                out = trainer.policy(own)
                sums[number][0] += float(out.loss_sum.detach())
                sums[number][1] += float(out.weight)
        alone.update({name: a / b for name, (a, b) in zip(("two_arms", "gantry"), sums.values(), strict=True) if b})

    return train(config, robots / "runs", watch=watch), alone


def test_each_robots_loss_is_that_of_its_samples_alone(trained):
    trainer, alone = trained
    first = read_rows(trainer.run.folder / "metrics.jsonl")[0]
    assert len(alone) == 2
    assert trainer.seen_cameras == 3
    assert {name: first[f"loss/{name}"] for name in alone} == pytest.approx(alone, rel=1e-5)
    last = read_rows(trainer.run.folder / "metrics.jsonl")[-1]
    assert last["val_loss"] == pytest.approx((2 * last["val_loss/two_arms"] + last["val_loss/gantry"]) / 3)
    assert np.isfinite([last["ema_val_action_mse/two_arms"], last["val_action_mse_repeat/gantry"]]).all()


def test_a_mixture_of_robots_goes_on_to_the_bit(trained, robots, config):
    trainer, _ = trained
    train(config, robots / "halves", "runner.max_steps=2")
    again = train(config, robots / "halves")
    for name, parameter in trainer.policy.named_parameters():
        assert torch.equal(parameter.full_tensor(), again.policy.get_parameter(name).full_tensor()), name


def test_statistics_are_each_robots_own(trained):
    trainer, _ = trained
    widths = {
        source.name: [len(stats.mean) for stats in load_norm_stats(trainer.run.folder / source.statistics).values()]
        for source in trainer.run.sources
    }
    assert widths == {"two_arms": [5, 5], "gantry": [2, 2]}


def export(trainer, output, capsys, *options):
    code = cli.main(["export", str(trainer.run.folder), "--output", str(output), *options])
    return code, "".join(capsys.readouterr())


def test_an_exported_mixture_acts_as_either_robot(trained, tmp_path, capsys):
    trainer, _ = trained
    code, said = export(trainer, tmp_path / "policy", capsys)
    assert code == 0, said
    hashes = json.loads((tmp_path / "policy" / "rlinf.json").read_text())["sha256"]
    assert {"norm_stats/two_arms.json", "norm_stats/gantry.json"} < hashes.keys()
    for source, rows in zip(trainer.data.sources, trainer.data.held_out, strict=True):
        policy = load_policy(tmp_path / "policy", source=source.name)
        noise = trainer.run.policy.draw(validation_generator(0, 0))["noise"]
        (row,) = rows.__getitems__([2])
        seen = {key: value for key, value in row.items() if not key.startswith("action")}
        sample = source.pipeline.encode(seen)
        with torch.no_grad():
            actions = trainer.policy.sample_actions(trainer.run.policy.collate([sample]), torch.from_numpy(noise)[None])
        expected = source.pipeline.decode(actions[0].numpy(), sample)
        assert expected.shape == (4, {"two_arms": 5, "gantry": 2}[source.name])
        np.testing.assert_allclose(policy.infer(seen, noise), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(UserError, match=r"has several datasets: name one of two_arms, gantry in load_policy"):
        load_policy(tmp_path / "policy")
    with pytest.raises(UserError, match=r"there is no source 'gantri'; did you mean 'gantry'\?"):
        load_policy(tmp_path / "policy", source="gantri")


def test_one_robots_policy_may_be_exported_alone(trained, tmp_path, capsys):
    trainer, _ = trained
    code, said = export(trainer, tmp_path / "gantry", capsys, "--source", "gantry")
    assert code == 0, said
    assert (tmp_path / "gantry" / "norm_stats.json").exists()
    assert load_policy(tmp_path / "gantry").data.default_prompt == "go there"
    code, said = export(trainer, tmp_path / "none", capsys, "--source", "two_arm")
    assert code == 2
    assert "there is no source 'two_arm'; did you mean 'two_arms'?: name one of two_arms, gantry with --source" in said


def test_other_projects_formats_hold_what_they_have_a_place_for(trained, tmp_path, capsys):
    trainer, _ = trained
    code, said = export(trainer, tmp_path / "openpi", capsys, "--format", "openpi")
    assert code == 0, said
    for source in trainer.run.sources:
        there = load_norm_stats(tmp_path / "openpi" / "assets" / source.name / "norm_stats.json")
        ours = load_norm_stats(trainer.run.folder / source.statistics)
        assert (there["actions"].q99 == ours["actions"].q99).all()
    code, said = export(trainer, tmp_path / "lerobot", capsys, "--format", "lerobot")
    assert code == 2
    assert "lerobot's format has statistics of one dataset: give --source, one of two_arms, gantry" in said


def test_commands_look_at_one_robot_of_a_mixture(config, capsys, monkeypatch):
    monkeypatch.setattr("rlinf_core.plugins.registry.get_plugins", repository_plugins)
    for command in ("norm-stats", "check-dataset"):
        assert cli.main([command, str(config), "--json", "--source", "gantry"]) == 0
        found = json.loads(capsys.readouterr().out)
        if command == "norm-stats":
            assert len(found["statistics"]["actions"]["mean"]) == 2
        else:
            assert (found["episodes"], found["ok"]) == (2, True)
        assert cli.main([command, str(config)]) == 2
        assert "has several datasets: name one of two_arms, gantry with --source" in capsys.readouterr().err


def test_rows_of_the_embedding_are_those_of_all_sources_prompts(robots, config):
    plugins = repository_plugins()
    run, layout = bind_policy(load_config(config, ["policy.train_embedding=used_rows"], plugins), plugins)
    (rows,) = layout.values()
    tokenize = run.sources[1].run.policy.transforms()[1]
    own, other = (tokenize({"prompt": text, "state": np.zeros(5)})["tokens"] for text in ("go there", "push the block"))
    assert set(rows).issuperset({*own.tolist(), *other.tolist()})
