"""The optimizer step's promises that no reference states: skipping, and state that exists from the start."""

import gc
import re

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from rlinf_core import PluginError
from rlinf_core.contract.optim import OptimConfig, OptimizerConfig, TrainedParameter
from rlinf_core.training.distributed.processes import processes
from rlinf_core.training.recipes import MuonConfig
from rlinf_core.training.state.ema import Ema
from rlinf_core.training.state.fsdp import ranks_mesh
from rlinf_core.training.state.optim import Optimizer, decays

SETTINGS = OptimConfig(lr=1e-2, min_lr=1e-3, warmup_steps=3, decay_steps=12)


def optimizer_of(named_parameters, recipe=SETTINGS, unused=()):
    trained = [TrainedParameter(name, p) for name, p in named_parameters if p.requires_grad]
    return Optimizer(
        [one for one in trained if one.name not in unused],
        recipe,
        SETTINGS.lr_at,
        clip_grad=SETTINGS.clip_grad,
        unused=[one.parameter for one in trained if one.name in unused],
    )


def make(recipe=SETTINGS):
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    return model, optimizer_of(model.named_parameters(), recipe)


def backward(model, step):
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
    (model(x) ** 2).mean().backward()


def test_a_non_finite_gradient_changes_nothing():
    model, optimizer = make()
    backward(model, 0)
    optimizer.step()
    before = {name: tensor.clone() for name, tensor in (model.state_dict() | optimizer.state_dict()).items()}
    backward(model, 1)
    model.weight.grad[0, 0] = float("nan")
    result = optimizer.step()
    assert float(result.skipped) == 1.0
    for name, tensor in (model.state_dict() | optimizer.state_dict()).items():
        assert torch.equal(tensor, before[name]), name


def test_the_schedule_counts_applied_steps_only():
    model, optimizer = make()
    rates = []
    for step in range(4):
        backward(model, step)
        if step == 1:
            model.bias.grad.fill_(float("inf"))
        rates.append(float(optimizer.step().lr))
    assert rates[1] == rates[2]
    assert rates[2] < rates[3]


def test_small_gradients_are_not_touched_and_large_ones_have_norm_one():
    for factor, expected in ((1e-3, None), (1e3, 1.0)):
        model, optimizer = make()
        backward(model, 0)
        for parameter in model.parameters():
            parameter.grad *= factor
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        result = optimizer.step()
        moment = torch.cat(
            [optimizer.state_dict()[f"exp_avg.{name}"].flatten() for name, _ in model.named_parameters()]
        )
        applied = moment / 0.1  # the first moment after one step is (1 - 0.9) * gradient
        torch.testing.assert_close(applied.norm(), torch.tensor(expected) if expected else gradient.norm())
        torch.testing.assert_close(result.grad_norm, gradient.norm())


def test_the_rate_stays_at_its_end_after_the_decay_and_needs_no_warmup():
    schedule = OptimConfig(lr=1e-2, min_lr=1e-3, warmup_steps=0, decay_steps=10)
    assert float(schedule.lr_at(torch.tensor(0))) == torch.tensor(1e-2)
    torch.testing.assert_close(schedule.lr_at(torch.tensor([10, 11, 10_000])), torch.full((3,), 1e-3))


def test_state_keeps_its_keys_and_its_memory_so_that_loading_can_write_into_it():
    model, optimizer = make()
    places = {name: tensor.data_ptr() for name, tensor in optimizer.state_dict().items()}
    backward(model, 0)
    optimizer.step()
    assert {name: tensor.data_ptr() for name, tensor in optimizer.state_dict().items()} == places


def test_frozen_parameters_cost_no_state():
    model = torch.nn.Linear(4, 3)
    model.bias.requires_grad_(False)
    optimizer = optimizer_of(model.named_parameters())
    assert not [name for name in optimizer.state_dict() if name.endswith("bias")]


def test_what_no_loss_reaches_has_no_state_and_decays_as_adamw_would_have_it():
    """The reference's AdamW multiplies it by 1 - lr · weight_decay in each step that is not skipped."""
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"used": torch.nn.Linear(4, 3), "kept": torch.nn.Linear(4, 3)})
    start = {name: p.detach().clone() for name, p in model["kept"].named_parameters()}
    decaying = SETTINGS.model_copy(update={"weight_decay": 0.1})
    optimizer = optimizer_of(model.named_parameters(), decaying, unused={"kept.weight", "kept.bias"})
    assert not any("kept" in name for name in optimizer.state_dict())
    factor = 1.0
    for step in range(4):
        backward(model["used"], step)
        if step == 2:
            model["used"].bias.grad[0] = float("nan")
        result = optimizer.step()
        factor *= 1 - float(result.lr) * 0.1 * (step != 2)
    assert factor < 0.9999
    for name, parameter in model["kept"].named_parameters():
        torch.testing.assert_close(parameter.detach(), start[name] * factor, rtol=1e-6, atol=0)


def test_the_references_decay_changes_no_float32_number():
    assert not decays(2.5e-5, 1e-10)
    assert decays(1e-3, 0.01)
    model, _ = make()
    assert not decays(1e-2, 1e-10)
    untouched = optimizer_of(model.named_parameters(), unused={"bias"})
    before = model.bias.detach().clone()
    backward(model, 0)
    untouched.step()
    assert torch.equal(model.bias, before)


# --- optimizers that know nothing of this step ------------------------------------------------------------------------


class Momentum(OptimizerConfig):
    """torch's SGD: scales no gradients, and its learning rates are numbers."""

    type: str = "momentum"
    lr: float = 1e-2
    bias_lr: float = 2e-2

    def build(self, parameters):
        groups = [
            {"params": [one.parameter for one in parameters if one.name == name], "lr": lr}
            for name, lr in (("weight", self.lr), ("bias", self.bias_lr))
        ]
        return torch.optim.SGD(groups, momentum=0.9)

    def initial_state(self, parameter):
        return {"momentum_buffer": torch.zeros_like(parameter.parameter)}


def test_any_torch_optimizer_gets_clipped_gradients_and_the_schedules_rates():
    model, optimizer = make(Momentum())
    weights = {name: p.detach().double() for name, p in model.named_parameters()}
    momenta = {name: torch.zeros_like(p) for name, p in weights.items()}
    norms = []
    for step in range(4):
        backward(model, step)
        if step == 1:
            model.weight.grad[0, 0] = float("nan")
        gradients = {name: p.grad.double() for name, p in model.named_parameters()}
        result = optimizer.step(torch.tensor(0.25))
        assert (float(result.skipped), model.weight.grad) == (float(step == 1), None)
        if step == 1:
            continue
        norm = sum(float(g.square().sum()) for g in gradients.values()) ** 0.5 / 0.25
        norms.append(norm)
        for name, gradient in gradients.items():
            momenta[name] = 0.9 * momenta[name] + gradient / 0.25 / max(norm, 1.0)
            weights[name] = weights[name] - float(result.lr) * (2 if name == "bias" else 1) * momenta[name]
    assert max(norms) > 1
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach().double(), weights[name], rtol=1e-5, atol=1e-6)
    assert torch.equal(
        optimizer.state_dict()["momentum_buffer.bias"], optimizer._torch.state[model.bias]["momentum_buffer"]
    )


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"initial_state": lambda self, parameter: {}}, "state of weight has 'momentum_buffer', which initial_state"),
        (
            {"build": lambda self, parameters: torch.optim.SGD([parameters[0].parameter], momentum=0.9)},
            "build() returned an optimizer without bias, which would never change",
        ),
        (
            {"build": lambda self, parameters: Replacing([one.parameter for one in parameters], {"lr": 1.0})},
            "a step replaced or removed the tensor 'momentum_buffer' in the state of weight",
        ),
    ],
)
def test_an_optimizer_that_checkpoints_would_not_hold_is_refused(changed, complaint):
    def step():
        model, optimizer = make(type("Changed", (Momentum,), changed)())
        backward(model, 0)
        optimizer.step()

    with pytest.raises(PluginError, match=re.escape(complaint)) as caught:
        step()
    assert str(caught.value).startswith("Changed: ")


class Replacing(torch.optim.Optimizer):
    def step(self):
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter] = {"momentum_buffer": parameter.grad.clone()}


# --- sharded parameters -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_steps_on_sharded_parameters_leave_nothing_behind_in_host_memory(kind):
    """Counted, because memory is noisy: torch 2.11 keeps a spec for every scalar that meets a DTensor in a fused step.

    30,000 steps of a policy with 520 parameters would take 9 GB per rank.
    """

    def specs():
        gc.collect()
        return sum(type(one).__name__ == "DTensorSpec" for one in gc.get_objects())

    settings = {"lr": 1e-2, "min_lr": 1e-3, "warmup_steps": 3, "decay_steps": 12}
    recipe = MuonConfig(lr=1e-2, ns_dtype="fp32") if kind == "muon" else OptimConfig(**settings, weight_decay=0.1)
    with processes("cpu"):
        model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 3))
        fully_shard(model, mesh=ranks_mesh("cpu", 1))
        trained = [TrainedParameter(name, p, name.startswith("0")) for name, p in model.named_parameters()]
        unused, trained = trained[-1:], trained[:-1]
        optimizer = Optimizer(trained, recipe, SETTINGS.lr_at, clip_grad=1.0, unused=[one.parameter for one in unused])
        ema, counted = Ema(model, 0.9), []
        for step in range(121):
            backward(model, step)
            model[1].bias.grad = None
            ema.update(optimizer.step(torch.tensor(2.0)).skipped)
            assert all(parameter.grad is None for parameter in model.parameters())
            if step % 60 == 0:
                counted.append(specs())
        assert counted[2] - counted[1] < 20, counted
        state = optimizer.state_dict()
        # Checkpoints hold whole tensors under any number of ranks, so that their shapes are those of the parameters.
        assert isinstance(state["exp_avg.1.weight"], DTensor)
        assert state["exp_avg.1.weight"].shape == (3, 6)
        assert torch.equal(state["step.1.weight"], torch.tensor(121.0))
