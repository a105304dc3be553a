"""Adapters: what a plugin adds to a policy trains, resumes and is merged; what it forgets is an error that names it."""

import json
from pathlib import Path
from types import SimpleNamespace

import distributions
import low_rank
import pytest
import torch
import toy_policy
from distributions import entry_point, repository_entry_points
from safetensors.torch import load_file
from tiny_pi0 import state_of
from torch import nn

from rlinf_core import UserError, hookimpl, open_rows
from rlinf_core.config.load import load_config
from rlinf_core.export import Choice, export_run
from rlinf_core.inference import load_policy
from rlinf_core.loggers.jsonl import read_rows
from rlinf_core.plan.step import plan
from rlinf_core.plugins.registry import PLUGIN_GROUP, Plugins
from rlinf_core.testing import plugins_in_memory
from rlinf_core.training.distributed.processes import processes
from rlinf_core.training.run_folder import prepare_folder
from rlinf_core.training.state.adapters import Merge
from rlinf_core.training.state.build import build_on_meta, build_policy
from rlinf_plugins_openpi.model.parts import unpacked
from rlinf_plugins_openpi.weights.names import EMBEDDING_IN_FILES, published_names
from rlinf_plugins_openpi.weights.saving import save_published

QUICKSTART = "examples/quickstart.toml"
SETTINGS = [
    *("runner.max_steps=3", "runner.save_interval=2", "runner.val_check_interval=0", "optim.ema_decay=0.5"),
    *("trainer.global_batch_size=4", "trainer.micro_batch_size=2", "trainer.activation_checkpointing=full"),
    *("data.num_workers=0", "data.validation_fraction=0.8", "policy.action_dim=8", "plugins.low_rank.rank=2"),
    *("optim.warmup_steps=0", "optim.lr=1e-2", "optim.weight_decay=0", "trainer.min_unit_size=0"),
]
IDLE = "prefix_end."
"""Prefix of what no loss reaches."""


def with_plugin(plugin):
    return Plugins([*repository_entry_points(), entry_point(PLUGIN_GROUP, "low_rank", plugin, "acme-low-rank")])


WITH, WITHOUT = with_plugin(low_rank), Plugins(repository_entry_points())


def whole(tensors):
    return {name: getattr(t.detach(), "full_tensor", t.detach)().clone() for name, t in tensors}


def train(*settings, plugins=WITH):
    """Train in this process; returns the trainer, and its weights before and after."""
    with pytest.MonkeyPatch.context() as patch, processes("cpu") as group:
        patch.delenv("RANK", raising=False)
        run = load_config(QUICKSTART, [*SETTINGS, *settings], plugins)
        trainer = run.trainer.build(run, start=prepare_folder(run, overwrite=False), group=group, plugins=plugins)
        before = whole(trainer.policy.named_parameters())
        trainer.train()
        return trainer, before, whole(trainer.policy.named_parameters())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def weights(folder):
    """Published weights; with its own initial values π0.5 has closed gates, which let no gradient pass."""
    dimensions = load_config(QUICKSTART, SETTINGS, WITH).policy.dimensions
    state = {name: 0.1 * tensor for name, tensor in state_of(dimensions).items()}
    save_published(state, folder / "model.safetensors", dimensions)
    return state


@pytest.fixture(scope="module")
def here(folder, weights):
    return [f"runner.output_dir={folder}", f"policy.weights={folder / 'model.safetensors'}"]


@pytest.fixture(scope="module")
def trained(here):
    return train(*here, "runner.name=whole")


def added(tensors):
    return {name for name in tensors if name.endswith((".up", ".down"))}


def test_the_documentation_shows_this_plugin():
    _, _, code = Path(low_rank.__file__).read_text().partition('"""\n\n')
    assert f"```python\n{code}```" in (distributions.ROOT / "docs" / "weights.md").read_text()


def test_only_what_the_plugin_adds_is_trained(trained, weights):
    trainer, before, after = trained
    assert all(torch.equal(before[name], weights[name]) for name in weights)
    assert before.keys() - weights.keys() == added(before)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in added(before) if not name.startswith(IDLE)}
    moments = {name for name in trainer.optimizer.state_dict() if name.startswith("exp_avg.")}
    assert moments == {f"exp_avg.{name}" for name in changed}
    assert trainer.ema.state_dict().keys() == changed
    state = json.loads((trainer.run.folder / "checkpoints" / "step_000000003" / "state.json").read_text())
    assert state["adapters"] == {"low_rank.LowRank": len(added(before))}


def test_the_policy_itself_starts_as_without_the_plugin(trained):
    """Packed matrices included (contract 2)."""
    run = trained[0].run
    with processes("cpu") as group:
        own, before = (
            whole(build_policy(run, run.trainer, group, plugins, None)[0].named_parameters())
            for plugins in (WITHOUT, WITH)
        )
    assert own.keys() == before.keys() - added(before)
    assert all(torch.equal(own[name], before[name]) for name in own)
    ups, downs = ([before[n] for n in added(before) if n.endswith(kind)] for kind in (".up", ".down"))
    assert not any(up.any() for up in ups)
    assert len({down.flatten()[0].item() for down in downs}) == len(downs)  # Each from a generator of its own.


def test_a_resumed_run_is_the_same_to_the_bit(trained, here):
    trainer, _, after = trained
    here = [*here, "runner.name=resumed"]
    train(*here, "runner.max_steps=2")
    resumed, _, end = train(*here)
    assert all(torch.equal(end[name], after[name]) for name in after)
    theirs, ours = (whole(one.ema.state_dict().items()) for one in (trainer, resumed))
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    one, other = (read_rows(one.run.folder / "metrics.jsonl") for one in (trainer, resumed))
    assert [row["loss"] for row in one] == [row["loss"] for row in other]


class Inactive:
    """The plugin's settings without what they are for."""

    rlinf_register_options = staticmethod(low_rank.rlinf_register_options)


class Wider(Inactive):
    @hookimpl
    def rlinf_policy_built(self, policy, run):
        options = low_rank.LowRankOptions(rank=3)
        low_rank.rlinf_policy_built(policy, SimpleNamespace(plugin_options=lambda _: options))


@pytest.mark.parametrize(
    ("plugin", "said"),
    [
        (Inactive, r"has parameters that this one lacks: .*\.down.* adapters \(32 of low_rank\.LowRank\)"),
        (Wider, r"has other shapes of: .*\.down.* and 28 more; .*the plugins that change it differ"),
    ],
)
def test_what_is_missing_at_a_resume_or_export_is_named(trained, here, tmp_path, plugin, said):
    with pytest.raises(UserError, match=rf"of another layout .*{said}"):
        train(*here, "runner.name=whole", "runner.max_steps=4", plugins=with_plugin(plugin()))
    with pytest.raises(UserError, match=rf"with another layout .*{said}"):
        export_run(trained[0].run.folder, tmp_path / "policy", Choice(), with_plugin(plugin()))
    assert list(tmp_path.iterdir()) == []


def merged(tensors):
    """By PEFT's formula for a linear layer, W + alpha / r · B · A, for each published tensor of a packed matrix.

    The first rows of B make the queries, and so on; all share A.
    """
    out = {name: tensor for name, tensor in tensors.items() if name not in added(tensors)}
    for name in added(tensors):
        if name.endswith(".up"):
            layer = name.removesuffix(".up")
            rows = [b @ tensors[f"{layer}.down"] * (8.0 / 2) for b in tensors[name].split(4)]
            out[f"{layer}.weight"] = out[f"{layer}.weight"] + torch.cat(rows)
    return out


@pytest.mark.parametrize("ema", [False, True])
def test_an_export_is_merged_and_acts_the_same_without_the_plugin(trained, tmp_path, ema):
    trainer, before, after = trained
    tensors = {**after, **whole(trainer.ema.state_dict().items())} if ema else after
    said = []
    export_run(trainer.run.folder, tmp_path / "policy", Choice(ema=ema), WITH, said.append)
    assert f"{len(added(before)) // 2} adapters merged into the weights: " in said[0]
    stored = load_file(tmp_path / "policy" / "model.safetensors")
    keys = published_names(trainer.run.policy.dimensions) | {"embedding.weight": EMBEDDING_IN_FILES}
    for name, tensor in unpacked(merged(tensors), trainer.run.policy.dimensions).items():
        torch.testing.assert_close(stored[keys[name]], tensor, rtol=1e-5, atol=1e-6)

    policy = load_policy(tmp_path / "policy", plugins=WITHOUT)
    row = open_rows(trainer.run, split="validation", plugins=WITH)[0]
    batch = policy.config.collate([policy.encode(row)])
    noise = torch.randn(1, policy.config.chunk_length(), 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = policy.module.sample_actions(batch, noise)
        if ema:
            with trainer.ema.in_place_of_weights():
                acted = trainer.policy.eval().sample_actions(batch, noise)
        else:
            acted = trainer.policy.eval().sample_actions(batch, noise)
    torch.testing.assert_close(plain, acted, rtol=1e-4, atol=1e-5)


def test_weights_are_merged_before_they_are_cast_and_in_every_format(trained, tmp_path):
    trainer, _, after = trained
    export_run(trainer.run.folder, tmp_path / "fp32", Choice(), WITH)
    export_run(trainer.run.folder, tmp_path / "bf16", Choice(dtype="bf16", format="openpi"), WITH)
    exact, cast = (load_file(tmp_path / dtype / "model.safetensors") for dtype in ("fp32", "bf16"))
    assert all(torch.equal(cast[key], exact[key].bfloat16()) for key in exact)
    # A run may start from merged weights, again with adapters.
    settings = [f"runner.output_dir={tmp_path}", f"policy.weights={tmp_path / 'fp32'}", "runner.max_steps=1"]
    _, before, _ = train(*settings)
    assert all(torch.allclose(before[name], tensor) for name, tensor in merged(after).items())


def test_a_plan_counts_what_the_plugin_adds_and_freezes(trained):
    run, (_, before, _) = trained[0].run, trained
    planned = plan(run, WITH)
    trainable = sum(before[name].numel() for name in added(before) if not name.startswith(IDLE))
    assert planned.parameters.trainable == planned.parameters.reached == trainable
    assert planned.parameters.total == sum(tensor.numel() for tensor in before.values())
    assert planned.flops_from == "counted, padding included: plugins have changed what trains"
    assert planned.flops_per_sample < plan(run, WITHOUT).flops_per_sample


@pytest.mark.slow  # Ranks have to be started; tensors that are made whole and then sliced are in test_run.
def test_two_ranks_merge_the_same_weights(trained, here, folder, tmp_path, start_ranks):
    distributions.install(tmp_path / "site", "acme-low-rank", plugins={"low_rank": "low_rank"})
    settings = [*SETTINGS, *here, "runner.name=two", "trainer.micro_batch_size=1"]
    result = start_ranks("rlinf_core.train:main", 2, QUICKSTART, *settings, paths=[tmp_path / "site"])
    assert result.returncode == 0, result.stdout + result.stderr
    assert "adapters: 16 of low_rank.LowRank add 10,496 numbers; " in result.stdout
    export_run(folder / "two", tmp_path / "two", Choice(), WITH)
    export_run(trained[0].run.folder, tmp_path / "one", Choice(), WITH)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-4)


# What plugins forget, on a toy policy.


class Wrapped(nn.Module):
    """As PEFT's layers do it."""

    def __init__(self, layer):
        super().__init__()
        self.base_layer = layer


class Value(nn.Linear):
    """A head for reinforcement learning: no action depends on it."""

    def initial_value(self, name, shape, generator):
        return torch.ones(shape)

    def merged(self, tensors):
        return {}


class Scaled(toy_policy.Block):
    """A block whose output is scaled."""

    def __init__(self, block):
        super().__init__()
        self.up, self.down = block.up, block.down
        self.gain = nn.Parameter(torch.empty(toy_policy.WIDTH))

    def initial_value(self, name, shape, generator):
        return torch.ones(shape)

    def merged(self, tensors):
        weight, bias = tensors["down.weight"], tensors["down.bias"]
        return {"down.weight": tensors["gain"][:, None] * weight, "down.bias": tensors["gain"] * bias}


class Bottleneck(nn.Sequential):
    """Not linear, and so not mergeable; with a buffer."""

    def __init__(self, layer):
        super().__init__(nn.Linear(2 * toy_policy.WIDTH, 2), nn.GELU(), nn.Linear(2, toy_policy.WIDTH))
        self.weight, self.bias = layer.weight, layer.bias
        self.register_buffer("scale", torch.empty(1), persistent=False)

    def forward(self, x):
        return nn.functional.linear(x, self.weight, self.bias) + self.scale * super().forward(x)

    def initial_value(self, name, shape, generator):
        return torch.randn(shape, generator=generator)

    def rebuild_buffers(self):
        self.scale.fill_(0.5)


def toys(*changes):
    changing = [SimpleNamespace(rlinf_policy_built=hookimpl(change)) for change in changes]
    return plugins_in_memory(toy_policy, *changing, datasets={"toy": toy_policy.TrainableToyDataset})


def built(change):
    """The toy policy on the meta device, after a plugin's change."""
    return build_on_meta(SimpleNamespace(policy=toy_policy.TrainableToyPolicy()), toys(change))


def put(name, make):
    def rlinf_policy_built(policy):
        policy.set_submodule(name, make(policy.get_submodule(name)))

    return rlinf_policy_built


def add(name, make):
    def rlinf_policy_built(policy):
        setattr(policy, name, make())

    return rlinf_policy_built


def with_buffer():
    head = Value(2, 1)
    head.register_buffer("count", torch.zeros(1), persistent=False)
    return head


def freeze(policy):
    policy.requires_grad_(False)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            add("value", lambda: nn.Linear(2, 1)),
            r"without an initial value: value\.weight, value\.bias\..*initial_value",
        ),
        (
            put("blocks.0.up", Wrapped),
            r"renames .*: blocks\.0\.up\.weight is blocks\.0\.up\.base_layer\.weight now, and 1",
        ),
        (add("value", with_buffer), r"buffers that nobody fills: value\.count\..*needs a method rebuild_buffers\(\)"),
        (freeze, "freezes every parameter of the policy"),
    ],
)
def test_what_a_plugin_forgets_is_an_error_that_names_it(change, said):
    with pytest.raises(UserError, match=rf"rlinf_policy_built of in-memory 0 .*{said}"):
        built(change)


def test_a_plugin_may_remove_and_replace_parameters_as_before():
    def rlinf_policy_built(policy):
        del policy.blocks[1]
        policy.enter = nn.Linear(3, toy_policy.WIDTH)

    policy, adapters = built(rlinf_policy_built)
    assert len(policy.blocks) == 1
    assert not adapters.modules


def small(layer):
    return low_rank.LowRank(layer, 2, 4.0)


def merge(*changes):
    """What is exported after some changes, if every number of every parameter is 3, and what is said."""

    def rlinf_policy_built(policy):
        for change in changes:
            change(policy)

    policy, adapters = built(rlinf_policy_built)
    merging, out = Merge(policy, adapters), {}
    for name, shapes in merging.groups():
        out |= merging(name, {key: torch.full(shape, 3.0) for key, shape in shapes.items()})
    assert out.keys() == dict(toy_policy.ToyModule(5).named_parameters()).keys()
    return out, merging.notes()


def share(policy):
    policy.blocks[1].down.down = policy.blocks[0].down.down


def test_what_no_action_depends_on_is_left_out_and_that_is_said():
    tensors, notes = merge(add("value", lambda: Value(2, 1)))
    assert all((tensor == 3).all() for tensor in tensors.values())
    assert notes == ["1 adapter not exported, because the policy acts the same without: value (test_adapters.Value)"]


def test_adapters_in_adapters_and_with_common_parameters_are_merged():
    inside, shared = put("blocks.0.down", small), put("blocks.1.down", small)
    tensors, notes = merge(put("blocks.0", Scaled), inside, shared, share)
    assert (tensors["blocks.0.down.weight"] == 3 * (3 + 2 * 2 * 9)).all()
    assert (tensors["blocks.0.down.bias"] == 9).all()
    assert (tensors["blocks.1.down.weight"] == 3 + 2 * 2 * 9).all()
    assert notes == [
        "3 adapters merged into the weights: blocks.0.down (low_rank.LowRank), blocks.0 (test_adapters.Scaled), "
        "blocks.1.down (low_rank.LowRank)"
    ]


def returning(**tensors):
    def make(layer):
        adapter = small(layer)
        adapter.merged = lambda _: tensors
        return adapter

    return make


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (put("blocks.0.down", Bottleneck), r"down \(test_adapters\.Bottleneck\)\. .* Give the class a method merged"),
        (put("leave", returning(wieght=torch.ones(9))), r"'wieght', which the policy does not have: .* bias, weight"),
        (put("leave", returning(weight=torch.ones(2))), r"'weight' with the shape \[2\] instead of \[20, 16\]"),
    ],
)
def test_what_cannot_be_merged_is_refused_before_anything_is_lost(change, said):
    with pytest.raises(UserError, match=said):
        merge(change)


def test_an_adapter_beside_a_tied_weight_is_announced_and_not_merged():
    def rlinf_policy_built(policy):
        policy.blocks[1].down.weight = policy.blocks[0].down.weight
        put("blocks.1.down", small)(policy)

    policy, adapters = built(rlinf_policy_built)
    (_, warning) = adapters.facts(policy)
    assert warning.startswith(
        "warning: blocks.0.down.weight uses a parameter of the module that the adapter blocks.1.down"
    )
    merging = Merge(policy, adapters)
    *_, (name, shapes) = merging.groups()
    with pytest.raises(UserError, match=r"blocks\.0\.down\.weight uses the same parameter as its 'weight'"):
        merging(name, {key: torch.ones(shape) for key, shape in shapes.items()})


def train_toy(tmp_path, *changes):
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / "toy.toml").write_text(toy_policy.CONFIG)
    run = load_config(tmp_path / "toy.toml", [f"runner.output_dir={tmp_path}", "runner.max_steps=2"], toys())
    plugins = toys(*changes)
    with pytest.MonkeyPatch.context() as patch, processes("cpu") as group:
        patch.delenv("RANK", raising=False)
        start = prepare_folder(run, overwrite=False)
        trainer = run.trainer.build(run, start=start, group=group, plugins=plugins)
        trainer.train()
    return trainer


def test_an_adapter_that_is_not_linear_trains_and_its_run_begins_with_a_warning(tmp_path, capsys):
    trainer = train_toy(tmp_path, put("blocks.0.down", Bottleneck))
    said = capsys.readouterr().out
    assert "adapters: 1 of test_adapters.Bottleneck add 114 numbers; 2,662 of 2,662 train" in said
    assert "warning: `rlinf export` will refuse this run: 1 of test_adapters.Bottleneck cannot be merged" in said
    assert trainer.policy.blocks[0].down.scale == 0.5
    assert "gradient to the adapters" not in said


def test_what_the_policy_does_not_call_is_said(tmp_path, capsys):
    def freeze_and_add_value(policy):
        policy.requires_grad_(False)
        policy.value = Value(2, 1)

    train_toy(tmp_path, add("value", lambda: Value(2, 1)))
    said = capsys.readouterr().out
    assert said.count("gave no gradient to the adapters value (test_adapters.Value). A policy that multiplies") == 1
    with pytest.raises(UserError, match=r"the loss depends on no parameter that is trained: .* leave out this layer"):
        train_toy(tmp_path / "frozen", freeze_and_add_value)
