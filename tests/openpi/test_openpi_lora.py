"""π0.5 with adapters, from config to robot: training, resuming, both exports, several adapters on one base, PEFT."""

import json
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from distributions import ROOT
from tiny_pi0 import state_of

from rlinf_core import UserError, cli
from rlinf_core.config.load import load_config
from rlinf_core.export import Choice, export_run
from rlinf_core.inference import load_policy
from rlinf_core.loggers.jsonl import read_rows
from rlinf_core.lora.files import write_adapters
from rlinf_core.plan.step import plan
from rlinf_core.plugins.registry import get_plugins
from rlinf_core.training.distributed.processes import processes
from rlinf_core.training.run_folder import prepare_folder
from rlinf_core.training.state.build import build_on_meta
from rlinf_plugins_openpi.model import pi0
from rlinf_plugins_openpi.weights.saving import save_published

QUICKSTART = "examples/quickstart.toml"
SETTINGS = [
    *("runner.max_steps=3", "runner.save_interval=2", "runner.val_check_interval=0", "policy.action_dim=8"),
    *("trainer.global_batch_size=4", "trainer.micro_batch_size=2", "trainer.activation_checkpointing=full"),
    *("data.num_workers=0", "data.validation_fraction=0.8", "optim.warmup_steps=0", "optim.lr=1e-2"),
    *("optim.weight_decay=0", "trainer.min_unit_size=0"),
]
PEFT = ["policy.lora.rank=4", "policy.lora.dropout=0.1", "trainer.param_dtype=bf16"]
OPENPI = ["policy.lora.convention=openpi", "policy.lora.rank=2", "trainer.param_dtype=fp32"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs, and weights to start from: with its own initial values π0.5 has closed gates, which pass no gradient."""
    folder = tmp_path_factory.mktemp("runs")
    dimensions = load_config(QUICKSTART, SETTINGS).policy.dimensions
    state = {name: 0.1 * tensor for name, tensor in state_of(dimensions).items()}
    save_published(state, folder / "model.safetensors", dimensions)
    return folder


def configured(folder, *settings):
    given = [f"runner.output_dir={folder}", f"policy.weights={folder / 'model.safetensors'}"]
    return load_config(QUICKSTART, [*SETTINGS, *given, *settings])


def train(folder, *settings):
    """Train in this process; returns the trainer and its losses."""
    with pytest.MonkeyPatch.context() as patch, processes("cpu") as group:
        patch.delenv("RANK", raising=False)
        run = configured(folder, *settings)
        start = prepare_folder(run, overwrite=False)
        trainer = run.trainer.build(run, start=start, group=group, plugins=get_plugins())
        trainer.train()
    return trainer, [row["loss"] for row in read_rows(run.folder / "metrics.jsonl") if "loss" in row]


@pytest.fixture(scope="module")
def peft(folder):
    return train(folder, *PEFT, "runner.name=peft")


@pytest.fixture(scope="module")
def openpi(folder):
    return train(folder, *OPENPI, "runner.name=openpi")


def test_a_resumed_run_is_the_same_to_the_bit(folder, peft):
    train(folder, *PEFT, "runner.name=resumed", "runner.max_steps=2")
    trainer, losses = train(folder, *PEFT, "runner.name=resumed")
    assert losses == peft[1]
    theirs = dict(peft[0].policy.named_parameters())
    for name, parameter in trainer.policy.named_parameters():
        assert torch.equal(parameter.to_local(), theirs[name].to_local()), name


def test_how_frozen_weights_are_held_changes_nothing_in_bf16(folder, peft):
    """They are gathered in bfloat16 anyway."""
    _, losses = train(folder, *PEFT, "runner.name=fp32", "policy.lora.base_dtype=fp32")
    assert losses == peft[1]


@pytest.mark.slow
def test_ranks_change_nothing_beyond_rounding(folder, openpi, start_ranks):
    """Frozen weights in bfloat16 and trained ones in float32 are gathered together."""
    given = [*SETTINGS, *OPENPI, f"policy.weights={folder / 'model.safetensors'}"]
    done = start_ranks("option_runs:main", 2, folder / "ranks", QUICKSTART, f"two:{','.join(given)}")
    assert done.returncode == 0, done.stderr[-3000:]
    losses = [row["loss"] for row in json.loads((folder / "ranks" / "two" / "rows.json").read_text()) if "loss" in row]
    assert losses == pytest.approx(openpi[1], rel=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_options_of_the_trainer_change_nothing_beyond_rounding(folder, openpi, start_ranks):
    """Two replicas of two shards, weights in the CPU's memory, and compiled blocks, each with adapters."""
    given = [*SETTINGS, *OPENPI, f"policy.weights={folder / 'model.safetensors'}"]
    variants = {
        "replicas": ["trainer.num_replicas=2", "trainer.micro_batch_size=1"],
        "offloaded": ["trainer.cpu_offload=true", "trainer.micro_batch_size=1"],
        "compiled": ["trainer.compile=true", "trainer.micro_batch_size=1"],
    }
    named = [f"{name}:{','.join([*given, *settings])}" for name, settings in variants.items()]
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
    done = start_ranks("option_runs:main", 4, folder / "options", QUICKSTART, *named, **cache)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in variants:
        rows = json.loads((folder / "options" / name / "rows.json").read_text())
        assert [row["loss"] for row in rows if "loss" in row] == pytest.approx(openpi[1], rel=1e-4), name
    assert list((folder / "inductor").rglob("*.so"))


def test_a_run_keeps_nothing_for_frozen_weights(peft, openpi):
    for trainer, _ in (peft, openpi):
        frozen = {name: p for name, p in trainer.policy.named_parameters() if not p.requires_grad}
        assert {p.dtype for name, p in frozen.items() if name.startswith("layers.0.") and "lora" not in name} == {
            torch.bfloat16
        }
        assert not any(p.grad is not None for p in frozen.values())
        held = {key.partition(".")[2] for key in trainer.optimizer.state_dict()}
        assert not frozen.keys() & (held | (trainer.ema.state_dict().keys() if trainer.ema else set()))


def test_the_moving_average_is_off_by_default_in_openpis_convention(folder):
    assert configured(folder, *OPENPI).optim.ema_decay == 0
    assert configured(folder, *PEFT).optim.ema_decay == configured(folder).optim.ema_decay > 0
    assert configured(folder, *OPENPI, "optim.ema_decay=0.5").optim.ema_decay == 0.5


@pytest.fixture(scope="module")
def observation():
    image = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    return {"observation.image": image, "task": "push", "observation.state": np.zeros(4, np.float32)}


@pytest.fixture(scope="module")
def exported(folder, peft, openpi):
    """Run -> its merged policy and its adapters alone, loaded."""
    out = {}
    for trainer, _ in (peft, openpi):
        name = trainer.run.runner.name
        for how, option in {"merge": "--merge", "alone": "--adapters"}.items():
            command = ["export", str(trainer.run.folder), "--output", str(folder / f"{name}-{how}"), option, "--no-ema"]
            assert cli.main(command) == 0
        out[name] = [load_policy(folder / f"{name}-{how}") for how in ("merge", "alone")]
    return out


def actions(policy, observation):
    noise = np.random.default_rng(1).standard_normal((policy.config.action_horizon, 8)).astype(np.float32)
    return policy.infer(observation, noise)


@pytest.mark.parametrize("name", ["peft", "openpi"])
def test_merged_and_unmerged_policies_act_the_same(exported, observation, name):
    merged, alone = (actions(policy, observation) for policy in exported[name])
    assert np.abs(merged - alone).max() <= 2e-6 * np.abs(merged).max()


def test_several_adapters_share_one_base(folder, exported, observation):
    base = exported["peft"][1]
    shared = load_policy(folder / "openpi-alone", base=base)
    assert np.array_equal(actions(shared, observation), actions(exported["openpi"][1], observation))
    assert np.array_equal(actions(base, observation), actions(base, observation))
    theirs = dict(base.module.named_parameters())
    ours = {name: p for name, p in shared.module.named_parameters() if name.endswith("qkv.weight")}
    assert all(ours[name] is theirs[name] for name in ours if name.startswith("layers."))
    assert any(one is theirs.get(name) for name, one in ours.items())


def test_other_weights_are_refused(folder, exported):
    with pytest.raises(UserError, match=r"belong to other weights than .*peft-merge.*base=\.\.\."):
        load_policy(folder / "peft-alone", base=folder / "peft-merge")
    with pytest.raises(UserError, match="does not have the weights that these adapters belong to"):
        load_policy(folder / "peft-alone", base=exported["openpi"][1])
    with pytest.raises(UserError, match="holds a whole policy, not adapters"):
        load_policy(folder / "peft-merge", base=folder / "model.safetensors")


def test_a_run_continues_from_exported_adapters(folder, exported, observation):
    run = configured(folder, f"policy.lora.weights={folder / 'openpi-alone'}", "trainer.param_dtype=fp32")
    assert "trained whole" in run.policy.describe_lora()
    trainer, losses = train(folder, *(f"policy.lora.weights={folder / 'openpi-alone'}", "runner.name=continued"))
    assert trainer.run.policy == load_config(trainer.run.folder / "config.toml").policy
    assert len(losses) == 3


def test_validate_says_in_numbers_what_is_trained(folder, capsys, openpi):
    settings = [*SETTINGS, f"policy.weights={folder / 'model.safetensors'}", *OPENPI]
    assert cli.main(["validate", str(ROOT / QUICKSTART), "--json", *settings]) == 0
    said = json.loads(capsys.readouterr().out)["facts"]["adapters"]
    policy, _ = build_on_meta(openpi[0].run, get_plugins())
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    assert said.startswith(f"{trained:,} of ")


def test_the_plan_counts_frozen_weights_as_they_are_held(folder):
    states = {
        dtype: plan(configured(folder, *PEFT, f"policy.lora.base_dtype={dtype}"), get_plugins(), 1).states
        for dtype in ("bf16", "fp32")
    }
    policy, _ = build_on_meta(configured(folder, *PEFT), get_plugins())
    assert states["bf16"].weights == sum(p.numel() * p.itemsize for p in policy.parameters())
    assert states["fp32"].weights == 4 * sum(p.numel() for p in policy.parameters())
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    assert states["bf16"].optimizer == pytest.approx(8 * trained, rel=0.01)


FULL_SIZE = """
[runner]
max_steps = 1
[data]
config_name = "pi05_libero"
repo_id = "physical-intelligence/libero"
[policy]
weights = "random"
tokenizer = "google/paligemma-3b-pt-224"
[policy.lora]
convention = "{}"
rank_pattern = {{ vlm = 16, expert = 32 }}
[trainer]
type = "fsdp2"
global_batch_size = {}
micro_batch_size = {}
"""


def test_the_example_is_a_config():
    run = load_config(ROOT / "examples" / "pi05_lora.toml")
    assert "adapters of 247 matrices (rank 16, 32)" in run.policy.describe_lora()


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("convention", ["peft", "openpi"])
def test_pi05_fits_a_gpu_with_24_gb(tmp_path, convention, batch):
    """openpi states more than 22.5 GB."""
    (tmp_path / "run.toml").write_text(FULL_SIZE.format(convention, batch, batch))
    assert plan(load_config(tmp_path / "run.toml"), get_plugins(), 1).memory().total <= 22.5e9


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["policy.lora.rank=2", 'policy.freeze="vlm"'], "freeze = .vlm. has no effect with"),
        (["policy.lora.rank=2", 'policy.train_embedding="used_rows"'], "train_embedding = .used_rows. has no effect"),
        ([*OPENPI, "policy.lora.dropout=0.1"], "dropout: openpi's convention has none"),
        ([*OPENPI, 'policy.lora.targets=["attention"]'], "'attention' is neither 'vlm' nor 'expert'"),
        (["policy.lora.weights=x", "policy.lora.rank=4"], "rank would contradict weights"),
        (["policy.lora.rnk=4"], "policy.lora.rnk"),
        (["policy.lora.rank=-1"], "policy.lora.rank"),
    ],
)
def test_contradictions_are_mistakes_of_the_config(folder, settings, said):
    with pytest.raises(UserError, match=said):
        configured(folder, *settings)


def test_matrices_that_are_one_here_train_whole_together_or_not_at_all(folder):
    run = configured(folder, 'policy.lora.modules_to_save=["attention"]')
    build_on_meta(run, get_plugins())
    run = configured(folder, 'policy.lora.modules_to_save=["q_proj"]')
    with pytest.raises(UserError, match=r"q_proj.* and .*k_proj.* are one matrix here"):
        build_on_meta(run, get_plugins())


def test_adapters_alone_have_one_layout(folder, peft, tmp_path):
    with pytest.raises(UserError, match="leave out --adapters or --format"):
        export_run(peft[0].run.folder, tmp_path / "out", Choice(adapters="alone", format="openpi"), get_plugins())
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(
    not (find_spec("lerobot") and find_spec("peft")), reason="needs lerobot and PEFT: uv sync --group test"
)
@pytest.mark.parametrize("pi05", [False, True], ids=["pi0", "pi05"])
@pytest.mark.parametrize("convention", ["peft", "openpi"])
def test_peft_on_lerobots_module_computes_the_same(tmp_path, monkeypatch, pi05, convention):
    """openpi's adapters of each head are written as one of their ranks' sum."""
    from pair_of_lerobot import adapted_pair, batch_of, in_float64, theirs_of
    from peft import PeftModel

    monkeypatch.setattr(pi0, "time_features", in_float64)  # As lerobot has them.
    ours, theirs, changes = adapted_pair(pi05=pi05, convention=convention)
    batch = batch_of(ours.dimensions)
    arguments = (*theirs_of(batch, ours), batch["actions"], batch["noise"], batch["time"])
    with torch.no_grad():
        before = theirs.forward(*arguments).mean(-1)
        write_adapters(tmp_path, changes, {}, base="tiny")
        adapted = PeftModel.from_pretrained(theirs, tmp_path)
        wanted = adapted.base_model.model.forward(*arguments).mean(-1)
        found = ours.losses(batch)
    assert float((wanted - before).abs().max()) > 0.01
    assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-4)
