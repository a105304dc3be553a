"""An average on another device than the weights is the same average, while the next step is computed."""

import threading

import pytest
import torch
from torch import nn

from rlinf_core.training.state import ema as module
from rlinf_core.training.state.ema import AverageElsewhere, Ema

STEPS, SKIPPED = 5, 2


@pytest.fixture
def elsewhere(monkeypatch):
    """Where there is no GPU, an average on the CPU is treated as if the weights were not."""

    class Elsewhere(Ema):
        def __init__(self, *args):
            super().__init__(*args)
            self._elsewhere = AverageElsewhere(self._shards)

    return Elsewhere


def train(kind):
    """The average after each step; the third is skipped, with gradients that are NaN."""
    torch.manual_seed(0)
    policy = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3))
    average, seen = kind(policy, 0.9), []
    for step in range(STEPS):
        average.before_step()
        if step != SKIPPED:
            with torch.no_grad():
                for parameter in policy.parameters():
                    parameter.add_(torch.randn_like(parameter))
        average.update(torch.tensor(float(step == SKIPPED)))
        seen.append({name: one.clone() for name, one in average.state_dict().items()})
    with average.in_place_of_weights():
        seen.append({name: one.detach().clone() for name, one in policy.named_parameters()})
    return seen


def test_it_has_the_same_bits(elsewhere):
    for got, wanted in zip(train(elsewhere), train(Ema), strict=True):
        assert got.keys() == wanted.keys()
        assert all(torch.equal(got[name], wanted[name]) for name in wanted)


def test_update_returns_before_the_average_is_computed(elsewhere, monkeypatch):
    policy, allowed, compute = nn.Linear(3, 3), threading.Event(), torch._foreach_lerp_

    def slow(*args):
        assert allowed.wait(30)
        compute(*args)

    monkeypatch.setattr(module.torch, "_foreach_lerp_", slow)
    average = elsewhere(policy, 0.5)
    before = average.state_dict()["weight"].clone()
    with torch.no_grad():
        policy.weight.add_(1)
    average.update(torch.zeros(()))
    with torch.no_grad():
        policy.weight.add_(100)  # The next step; the average has the weights of this one.
    assert torch.equal(average._averages["weight"], before)
    allowed.set()
    torch.testing.assert_close(average.state_dict()["weight"], before + 0.5)


def test_what_fails_while_averaging_ends_the_run(elsewhere, monkeypatch):
    average = elsewhere(nn.Linear(3, 3), 0.5)

    def fails(*_):
        raise MemoryError("no more")

    monkeypatch.setattr(module.torch, "_foreach_lerp_", fails)
    average.update(torch.zeros(()))
    with pytest.raises(MemoryError, match="no more"):
        average.finish()
