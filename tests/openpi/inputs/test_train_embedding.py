"""`policy.train_embedding = "used_rows"`: the steps are those of `all`, and what no prompt uses costs no state."""

import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from rlinf_core import UserError
from rlinf_core.config.load import load_config
from rlinf_core.data.loading.encoding import encode_rows
from rlinf_core.data.statistics.preview import bind_policy
from rlinf_core.export import Choice, export_run
from rlinf_core.inference import load_policy
from rlinf_core.plan.step import plan
from rlinf_core.plugins.registry import get_plugins
from rlinf_core.testing import check_policy
from rlinf_core.training.distributed.processes import processes
from rlinf_core.training.run_folder import prepare_folder
from rlinf_core.training.state.build import initial_value
from rlinf_plugins_openpi import Pi05Config
from rlinf_plugins_openpi.config import ROWS
from rlinf_plugins_openpi.inputs.tokenizer import SMALL_MODEL, PromptTokenizer, possible_tokens
from rlinf_plugins_openpi.weights.names import EMBEDDING_IN_FILES
from rlinf_plugins_openpi.weights.saving import save_published

DECAY = ("optim.weight_decay=1e-10", "optim.clip_grad=1000.0")
"""The reference's, which rounding loses; gradients are not clipped, as a norm's last bits depend on what it is over."""
SETTINGS = [
    *("runner.max_steps=3", "runner.val_check_interval=0", "runner.save_interval=2", "data.num_workers=0"),
    *("trainer.global_batch_size=2", "trainer.micro_batch_size=2", "optim.warmup_steps=0", "optim.ema_decay=0.5"),
]


def configure(folder, name, *overrides):
    settings = [f"runner.output_dir={folder}", f"runner.name={name}", *SETTINGS, *overrides]
    return load_config("examples/quickstart.toml", settings)


def train(run):
    """The trainer after its last step, and its whole weights and averages."""
    with pytest.MonkeyPatch.context() as patch, processes("cpu") as group:
        patch.delenv("RANK", raising=False)
        start = prepare_folder(run, overwrite=False)
        trainer = run.trainer.build(run, start=start, group=group, plugins=get_plugins())
        trainer.train()
        live = {name: p.detach().full_tensor().clone() for name, p in trainer.policy.named_parameters()}
        ema = {name: average.full_tensor().clone() for name, average in trainer.ema.state_dict().items()}
    return trainer, live, ema


def whole(tensors, rows):
    """The embedding with its trained rows in their places."""
    table = tensors["embedding.weight"].clone()
    table[list(rows)] = tensors["embedding_rows.weight"]
    return {**tensors, "embedding.weight": table}


def assert_same_bits(tensors, others):
    assert [name for name, tensor in others.items() if not torch.equal(tensors[name], tensor)] == []


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Published weights, and their tensors."""
    folder = tmp_path_factory.mktemp("weights")
    model = configure(folder, "any").policy.build()
    state = {
        name: model.initial_value(name, tuple(p.shape), torch.Generator().manual_seed(i))
        for i, (name, p) in enumerate(model.named_parameters())
    }
    save_published(state, folder / "model.safetensors", model.dimensions)
    return f"policy.weights={folder}", state


@pytest.fixture(scope="module")
def trained(tmp_path_factory, weights):
    """A run with the reference's weight decay."""
    folder = tmp_path_factory.mktemp("runs")
    run = configure(folder, "used", weights[0], "policy.train_embedding=used_rows", *DECAY)
    return run, *train(run)


def test_steps_are_those_of_a_run_that_trains_all(tmp_path, weights, trained):
    _, used, live, ema = trained
    _, live_all, ema_all = train(configure(tmp_path, "all", weights[0], *DECAY))
    rows = used.run.policy._rows
    assert 3 < len(rows) < len(weights[1]["embedding.weight"]) / 2
    assert_same_bits(whole(live, rows), live_all)
    # Rows that do not change are their own average: here to the bit, over thousands of steps their sums would drift.
    assert_same_bits(whole(ema | {"embedding.weight": weights[1]["embedding.weight"]}, rows), ema_all)


def test_the_other_rows_have_neither_gradient_nor_state_nor_average(trained):
    _, used, _, ema = trained
    assert used.policy.embedding.weight.grad is None
    assert "embedding.weight" not in ema
    state = used.optimizer.state_dict()
    assert not any(name.endswith(".embedding.weight") for name in state)
    assert state["exp_avg.embedding_rows.weight"].shape == (len(used.run.policy._rows), 64)


def test_a_decay_that_counts_is_that_of_a_run_that_trains_all(tmp_path, weights):
    settings = (weights[0], "optim.weight_decay=0.3", "optim.clip_grad=1000.0")
    used, live, ema = train(configure(tmp_path, "used", *settings, "policy.train_embedding=used_rows"))
    _, live_all, ema_all = train(configure(tmp_path, "all", *settings))
    assert_same_bits(whole(live, used.run.policy._rows), live_all)
    assert_same_bits(whole(ema, used.run.policy._rows), ema_all)


@pytest.mark.parametrize("ema", [False, True])
def test_an_export_has_one_table_whose_other_rows_are_those_of_the_start(trained, weights, tmp_path, ema):
    run, used, live, averages = trained
    export_run(run.folder, tmp_path / "out", Choice(ema=ema), get_plugins())
    table = load_file(tmp_path / "out" / "model.safetensors")[EMBEDDING_IN_FILES]
    start, rows = weights[1]["embedding.weight"], list(used.run.policy._rows)
    others = sorted(set(range(len(start))) - set(rows))
    assert torch.equal(table[others], start[others])
    assert torch.equal(table[rows], (averages if ema else live)["embedding_rows.weight"])
    policy = load_policy(tmp_path / "out")
    assert policy.config.train_embedding == "all"
    assert policy.config.transforms()[1].allowed is None  # It acts on any prompt.


def test_a_run_goes_on_from_its_checkpoint_to_the_bit(trained, tmp_path):
    run, _, live, _ = trained
    shutil.copytree(run.folder, tmp_path / "used")
    (tmp_path / "used" / "latest").write_text("step_000000002")
    again = run.model_copy(update={"runner": run.runner.model_copy(update={"output_dir": str(tmp_path)})})
    trainer, again_live, _ = train(again)
    assert trainer.step == 3
    assert_same_bits(again_live, live)


def test_other_rows_are_refused_with_what_changed(trained, tmp_path, monkeypatch):
    run, used, _, _ = trained
    shutil.copytree(run.folder, tmp_path / "used")
    (tmp_path / "used" / "latest").write_text("step_000000002")
    again = run.model_copy(update={"runner": run.runner.model_copy(update={"output_dir": str(tmp_path)})})
    rows = used.run.policy._rows
    kept = [*rows[:-1], 511]
    monkeypatch.setattr(type(run.policy), "data_layout", lambda self, prompts: {ROWS: kept})
    with pytest.raises(UserError, match=rf"{len(rows)} then, {len(rows)} now; 1 new \(511\), 1 gone \({rows[-1]}\)"):
        train(again)


def test_a_token_of_no_prompt_is_refused_by_its_text_and_row(trained):
    _, used, _, _ = trained
    row = used.data.sources[0].rows.without_images([5])[0] | {"task": "open the zebra"}
    source = used.data.sources[0]
    with pytest.raises(UserError, match=r"the prompt 'open the zebra' has the token \d+, '.+', that none .* frame 5"):
        encode_rows(source.rows, [5], [row], source.pipeline)


def test_rows_of_held_out_tasks_are_among_them(tmp_path, weights):
    plugins = get_plugins()
    held_out = ("data.validation_fraction=0.0", 'data.validation_tasks=["Push the puck to a goal"]')
    used = "policy.train_embedding=used_rows"
    some, every = (configure(tmp_path, "any", *extra, used) for extra in (held_out, ("data.validation_fraction=0.0",)))
    layouts = [bind_policy(run, plugins)[1] for run in (some, every)]
    assert layouts[0] == layouts[1]


def test_any_state_has_tokens_that_are_trained():
    tokenizer = PromptTokenizer(SMALL_MODEL, 200)
    tokens = set(possible_tokens(tokenizer, ["pick up the puck"], with_state=True))
    generator = np.random.default_rng(0)
    for _ in range(200):
        state = generator.uniform(-1.2, 1.2, generator.integers(1, 9))
        assert tokens.issuperset(tokenizer.encode("pick up the puck", state))
    assert possible_tokens(tokenizer, ["pick"], with_state=False) == sorted({0, *tokenizer.encode("pick")})


def test_nothing_is_trained_of_a_frozen_embedding(tmp_path, weights):
    with pytest.raises(UserError, match=r'train_embedding = "used_rows" has no effect with freeze = "vlm"'):
        configure(tmp_path, "any", weights[0], "policy.freeze=vlm", "policy.train_embedding=used_rows")


def test_initial_rows_are_those_of_the_whole_table(tmp_path):
    run = configure(tmp_path, "any", "policy.train_embedding=used_rows")
    policy = run.policy.with_data_layout({ROWS: [0, 2, 7]})
    model = policy.build()
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    rows, table = (initial_value(policy, model, 3, n, shapes[n]) for n in ("embedding_rows.weight", "embedding.weight"))
    assert torch.equal(rows, table[[0, 2, 7]])


def test_the_option_keeps_what_trainers_rely_on():
    check_policy(Pi05Config(variant="dummy", weights="random", train_embedding="used_rows"))


def test_a_plan_counts_the_rows_that_are_trained(trained):
    run, used, _, _ = trained
    made = plan(run, get_plugins(), 1)
    shapes = {parameter.name: parameter for unit in made.units for parameter in unit.parameters}
    assert not shapes["embedding.weight"].trainable
    assert shapes["embedding_rows.weight"].shape == (len(used.run.policy._rows), 64)
    trained_numbers = sum(p.numel() for p in used.policy.parameters() if p.requires_grad)
    assert made.parameters.trainable == trained_numbers


def test_a_plan_without_data_counts_some_rows_and_says_so(tmp_path):
    overrides = ("data.repo_id=nobody/nothing", "policy.train_embedding=used_rows", "data.validation_fraction=0.0")
    made = plan(configure(tmp_path, "any", *overrides), get_plugins(), 1)
    assert any("own defaults for sizes that depend on the data: " in text for text in made.assumptions)
    run = configure(
        tmp_path,
        "any",
        "policy.train_embedding=used_rows",
        "policy.variant=base",
        "policy.weights=random",
        "policy.tokenizer=a.model",
    )
    with torch.device("meta"):
        model = run.policy.build_to_count()
    assert model.embedding_rows.weight.shape == (1024, 2048)
