"""The optimizer step's promises that no reference states: skipping, and state that exists from the start."""

import torch

from rlinf_core.training.optim import Optimizer, Schedule


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
