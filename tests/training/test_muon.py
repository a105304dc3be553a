"""Muon against `torch.optim.Muon` on whole matrices; sharded, any number of ranks gives the same."""

import pytest
import torch
from muon_ranks import LR, OUTSIDE, PARTS, SHAPES, SKIPPED, STEPS, Module, gradient, make, train
from safetensors.torch import load_file

from rlinf_core import TrainedParameter, UserError
from rlinf_core.loggers.jsonl import read_rows
from rlinf_core.optimizers.orthogonal import newton_schulz
from rlinf_core.training.distributed.processes import processes
from rlinf_core.training.recipes import MuonConfig
from rlinf_core.training.resume import Flags, decide_start
from rlinf_core.training.run_folder import read_folder
from rlinf_core.training.state.fsdp import local_shard
from rlinf_core.training.state.optim import Optimizer

ORIGINAL = {"adjust_lr": "original", "nesterov": False, "momentum": 0.9, "ns_steps": 3}
MATRICES = [name for name, shape in SHAPES.items() if len(shape) == 2 and name not in OUTSIDE]


def whole(gradient, parameter):
    return gradient


def tensors(module, optimizer):
    return {**dict(module.named_parameters()), **optimizer.state_dict()}


@pytest.fixture(scope="module")
def trained():
    return {
        key: (module := Module(), train(module, whole, **settings))
        for key, settings in {"default": {}, "original": ORIGINAL}.items()
    }


@pytest.mark.parametrize("case", ["default", "original"])
def test_matrices_follow_torchs_muon_and_the_rest_torchs_adamw(trained, case):
    """To the rounding of the learning rate, a float32 tensor here and a Python number there."""
    start = dict(Module().named_parameters())
    pieces = {}
    for name in MATRICES:
        rows = list(PARTS.get(name, {"all": SHAPES[name][0]}).values())
        pieces[name] = [torch.nn.Parameter(piece.clone()) for piece in start[name].detach().split(rows)]
    rest = {name: start[name] for name in SHAPES if name not in MATRICES}
    flat = [piece for several in pieces.values() for piece in several]
    settings = ORIGINAL if case == "original" else {}
    muon = torch.optim.Muon(
        flat,
        weight_decay=0.1,
        momentum=settings.get("momentum", 0.95),
        nesterov=settings.get("nesterov", True),
        ns_steps=settings.get("ns_steps", 5),
        adjust_lr_fn=settings.get("adjust_lr", "match_rms_adamw"),
    )
    adamw = torch.optim.AdamW(rest.values(), betas=(0.9, 0.95), weight_decay=0.1)
    applied = 0
    for step in range(STEPS):
        if step == SKIPPED:
            continue
        for name, several in pieces.items():
            whole_gradient = gradient(name, SHAPES[name], step)
            for piece, part in zip(several, whole_gradient.split([len(p) for p in several]), strict=True):
                piece.grad = part
        for name, parameter in rest.items():
            parameter.grad = gradient(name, SHAPES[name], step)
        for optimizer in (muon, adamw):
            optimizer.param_groups[0]["lr"] = LR * (1.0 - 0.1 * applied)
            optimizer.step()
        applied += 1
    module, _ = trained[case]
    for name, parameter in module.named_parameters():
        expected = torch.cat([p.detach() for p in pieces[name]]) if name in pieces else rest[name].detach()
        torch.testing.assert_close(
            parameter.detach(), expected, rtol=2e-6, atol=2e-7, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_newton_schulz_has_the_bits_of_torchs():
    from torch.optim._muon import _zeropower_via_newtonschulz

    for shape in ((17, 4), (5, 16), (6, 6), (1, 6)):
        matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        expected = _zeropower_via_newtonschulz(matrix, (3.4445, -4.7750, 2.0315), 5, 1e-7)
        assert torch.equal(newton_schulz(matrix.bfloat16(), 5), expected), shape
        values = torch.linalg.svdvals(newton_schulz(matrix, 5))
        assert 0.6 < values.min() <= values.max() < 1.3, shape
    assert torch.equal(newton_schulz(torch.zeros(3, 3), 5), torch.zeros(3, 3))


def test_a_skipped_step_changes_no_bit():
    module = Module()
    optimizer = train(module, whole)
    before = {name: t.detach().clone() for name, t in tensors(module, optimizer).items()}
    for name, parameter in module.named_parameters():
        parameter.grad = torch.full(SHAPES[name], float("inf"))
    assert float(optimizer.step().skipped) == 1.0
    for name, tensor in tensors(module, optimizer).items():
        assert torch.equal(tensor, before[name]), name


def test_matrices_have_one_moment_and_the_rest_adamws():
    kinds = {}
    for key in make(Module()).state_dict():
        kind, _, name = key.partition(".")
        kinds.setdefault(name, set()).add(kind)
    assert {name for name, found in kinds.items() if found == {"momentum_buffer"}} == set(MATRICES)
    assert kinds["head"] == kinds["bias"] == {"step", "exp_avg", "exp_avg_sq"}


def test_what_adamw_trains_may_have_a_learning_rate_of_its_own():
    module = Module()
    optimizer = make(module, adamw_lr=LR / 10)
    before = module.bias.detach().clone()
    for name, parameter in module.named_parameters():
        parameter.grad = gradient(name, SHAPES[name], 0)
    assert float(optimizer.step().lr) == pytest.approx(LR)
    expected = before * (1 - LR / 10 * 0.1) - LR / 10 * gradient("bias", SHAPES["bias"], 0).sign()
    torch.testing.assert_close(module.bias.detach(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("ranks", "replicas"), [(3, 1), (4, 2)])
def test_any_number_of_ranks_gives_the_same(tmp_path, start_ranks, trained, ranks, replicas):
    """Matrices are orthogonalised whole: shards of 3 ranks are uneven, some are empty, and replicas compute alike."""
    result = start_ranks("muon_ranks:main", ranks, tmp_path, replicas)
    assert result.returncode == 0, result.stderr[-3000:]
    found = load_file(tmp_path / f"{ranks}.{replicas}.safetensors")
    module, optimizer = trained["default"]
    for name, expected in tensors(module, optimizer).items():
        matrix = name.removeprefix("momentum_buffer.") in MATRICES
        # The fused AdamW rounds a shard's last elements differently from those it takes eight at a time.
        exact = {"rtol": 0, "atol": 0} if matrix else {"rtol": 1e-6, "atol": 1e-7}
        torch.testing.assert_close(found[name], expected.detach(), **exact, msg=f"{name} is off")


def test_in_float32_the_rounding_of_a_gradient_stays_rounding():
    """A matrix of rank one: all other singular values are rounding, which the iterations enlarge."""
    generator = torch.Generator().manual_seed(3)
    gradient = torch.outer(torch.randn(64, generator=generator), torch.randn(48, generator=generator))
    noise = 1e-5 * torch.randn(64, 48, generator=generator)
    moved = {}
    for dtype in ("bf16", "fp32"):
        weights = [torch.nn.Parameter(torch.zeros(64, 48)) for _ in range(2)]
        for weight, given in zip(weights, (gradient, gradient + noise), strict=True):
            parameters = [TrainedParameter("w", weight, in_block=True)]
            recipe = MuonConfig(lr=1.0, ns_dtype=dtype)
            optimizer = Optimizer(parameters, recipe, torch.ones_like, clip_grad=1e9)
            weight.grad = given
            optimizer.step()
        one, other = (weight.detach() for weight in weights)
        moved[dtype] = float((one - other).norm() / one.norm())
    assert 0 < moved["fp32"] < moved["bf16"] / 3, moved


def test_it_is_refused_where_there_is_nothing_for_it():
    parameters = [TrainedParameter("head", torch.nn.Parameter(torch.ones(2, 2)))]
    with pytest.raises(UserError, match=r'optim\.type = "muon" has nothing to do: no trained parameter is a matrix'):
        MuonConfig().build(parameters)


# --- in a run ---------------------------------------------------------------------------------------------------------

RUN = ("optim.type=muon", "optim.schedule=hf_cosine", "optim.warmup_steps=2", "optim.decay_steps=8")


def test_a_run_resumes_to_the_bit_and_holds_what_plan_counts(train_toy, configure_toy, toy_plugins):
    from rlinf_core.plan.step import plan

    once = train_toy(*RUN, "runner.name=once", "runner.max_steps=8")
    train_toy(*RUN, "runner.name=twice", "runner.max_steps=4")
    twice = train_toy(*RUN, "runner.name=twice", "runner.max_steps=8")
    ours, theirs = ({k: local_shard(t) for k, t in one._state.tensors().items()} for one in (once, twice))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    momenta = [key.removeprefix("optim.momentum_buffer.") for key in ours if key.startswith("optim.momentum_buffer.")]
    assert momenta == [f"blocks.{i}.{name}.weight" for i in range(2) for name in ("up", "down")]
    held = sum(tensor.nbytes for key, tensor in ours.items() if key.startswith("optim.") and key != "optim.applied")
    assert plan(configure_toy(*RUN), toy_plugins, 1).states.optimizer == held
    rates = [row["lr"] for row in read_rows(once.run.folder / "metrics.jsonl")]
    assert rates[:3] == pytest.approx([0.0, 0.005, 0.01])
    assert rates[-1] < 1e-3


def test_a_run_cannot_go_on_with_an_optimizer_whose_state_its_checkpoint_lacks(train_toy, configure_toy, toy_plugins):
    train_toy("runner.name=r", "runner.max_steps=2")
    with pytest.raises(UserError, match=r"optim.type: 'adamw' -> 'muon' \(changes what a step computes\)"):
        train_toy("runner.name=r", "runner.max_steps=4", "optim.type=muon")
    changed = configure_toy("runner.name=r", "runner.max_steps=4", "optim.type=muon")
    start = decide_start(changed, read_folder(changed), Flags(allow_change=True))
    with (
        processes("cpu") as group,
        pytest.raises(UserError, match=r"does not hold optim\.momentum_buffer\.blocks.*: optim.type, optim.ema_decay"),
    ):
        changed.trainer.build(changed, start=start, group=group, plugins=toy_plugins)
