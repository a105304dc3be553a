"""The optimizer step's promises that no reference states: skipping, and state that exists from the start."""

import torch

from rlinf_core.training.optim import Optimizer, Schedule, decays


def make(schedule=None):
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    schedule = schedule or Schedule(1e-2, 1e-3, 3, 12)
    return model, Optimizer(
        model.named_parameters(), schedule, betas=(0.9, 0.95), eps=1e-8, weight_decay=1e-10, clip_grad=1.0
    )


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
    schedule = Schedule(1e-2, 1e-3, 0, 10)
    assert float(schedule.at(torch.tensor(0))) == torch.tensor(1e-2)
    torch.testing.assert_close(schedule.at(torch.tensor([10, 11, 10_000])), torch.full((3,), 1e-3))


def test_state_keeps_its_keys_and_its_memory_so_that_loading_can_write_into_it():
    model, optimizer = make()
    places = {name: tensor.data_ptr() for name, tensor in optimizer.state_dict().items()}
    backward(model, 0)
    optimizer.step()
    assert {name: tensor.data_ptr() for name, tensor in optimizer.state_dict().items()} == places


def test_frozen_parameters_cost_no_state():
    model = torch.nn.Linear(4, 3)
    model.bias.requires_grad_(False)
    optimizer = Optimizer(
        model.named_parameters(), Schedule(1e-2, 1e-3, 3, 12), betas=(0.9, 0.95), eps=1e-8, weight_decay=0, clip_grad=1
    )
    assert not [name for name in optimizer.state_dict() if name.endswith("bias")]


def test_what_no_loss_reaches_has_no_state_and_decays_as_adamw_would_have_it():
    """The reference's AdamW multiplies it by 1 - lr · weight_decay in each step that is not skipped."""
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"used": torch.nn.Linear(4, 3), "kept": torch.nn.Linear(4, 3)})
    start = {name: p.detach().clone() for name, p in model["kept"].named_parameters()}
    settings = {"betas": (0.9, 0.95), "eps": 1e-8, "clip_grad": 1.0, "unused": {"kept.weight", "kept.bias"}}
    optimizer = Optimizer(model.named_parameters(), Schedule(1e-2, 1e-3, 3, 12), weight_decay=0.1, **settings)
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
    model, optimizer = make()
    assert not decays(1e-2, 1e-10)
    untouched = Optimizer(
        model.named_parameters(),
        optimizer.schedule,
        betas=(0.9, 0.95),
        eps=1e-8,
        weight_decay=1e-10,
        clip_grad=1.0,
        unused={"bias"},
    )
    before = model.bias.detach().clone()
    backward(model, 0)
    untouched.step()
    assert torch.equal(model.bias, before)
