"""Reported speed: useful operations by the policy's formula, or counted if it has none."""

from types import SimpleNamespace

import pytest
import torch
from toy_policy import ToyModule

from rlinf_core import hookimpl
from rlinf_core.testing import plugins_in_memory
from rlinf_core.training.monitor import metrics as throughput
from rlinf_core.training.monitor.metrics import Throughput

BATCH = {"state": torch.zeros(4, 3), "noise": torch.zeros(4, 4, 5), "actions": torch.zeros(4, 4, 5)}


@hookimpl
def freeze(policy):
    policy.enter.requires_grad_(False)
    policy.blocks.requires_grad_(False)


def of(monkeypatch, formula, *, card="NVIDIA A100-SXM4-80GB", build=lambda: ToyModule(5), ranks=2, changed=False):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: card)
    said = []
    config = SimpleNamespace(useful_flops=lambda batch: formula, build_to_count=build, lora=None)
    group = SimpleNamespace(size=ranks, device=torch.device("cuda" if card else "cpu"))
    plugins = plugins_in_memory(SimpleNamespace(rlinf_policy_built=freeze)) if changed else plugins_in_memory()
    trained = ToyModule(5)
    plugins.hook.rlinf_policy_built(policy=trained, run=None)
    run = SimpleNamespace(policy=config)
    return Throughput(run, trained, group, plugins, said.append, changed=changed), said


def test_mfu_is_the_share_of_the_peak_that_useful_operations_get(monkeypatch):
    speed, said = of(monkeypatch, 78e12)
    assert speed.metrics(2 * speed.tflop(BATCH), 0.5) == {"tflops_per_second": 156.0, "mfu": 0.5}
    assert not said


@pytest.mark.parametrize("card", ["", "NVIDIA T600"])
def test_without_a_known_peak_there_is_no_mfu(monkeypatch, card):
    speed, _ = of(monkeypatch, 1e12, card=card)
    assert speed.metrics(speed.tflop(BATCH), 1.0) == {"tflops_per_second": 0.5}


def test_a_policy_without_a_formula_is_counted_once_and_that_is_said(monkeypatch):
    counted = []
    monkeypatch.setattr(throughput, "count", lambda *a: counted.append(a) or SimpleNamespace(flops=3e12))
    speed, said = of(monkeypatch, None)
    assert [speed.tflop(BATCH), speed.tflop(BATCH)] == [3.0, 3.0]
    assert len(counted) == len(said) == 1
    assert "padding" in said[0]


def test_on_a_cpu_nothing_is_counted(monkeypatch):
    speed, said = of(monkeypatch, None, card="")
    assert speed.metrics(speed.tflop(BATCH), 1.0) == {}
    assert not said


def test_what_cannot_be_counted_is_said_once_and_the_run_goes_on(monkeypatch):
    class Reads(ToyModule):
        def forward(self, batch):
            return super().forward(batch) if batch["state"].sum().item() else None

    speed, said = of(monkeypatch, None, build=lambda: Reads(5))
    assert [speed.tflop(BATCH), speed.tflop(BATCH)] == [0.0, 0.0]
    (note,) = said
    assert "no mfu" in note


def test_a_toy_is_counted_as_it_computes(monkeypatch):
    speed, _ = of(monkeypatch, None)
    weights = 3 * 16 + 2 * (2 * 16 * 32) + 16 * 20  # The first layer's input needs no gradient.
    assert speed.tflop(BATCH) * 1e12 == 2 * 4 * (3 * weights - 3 * 16)


def test_what_a_plugin_freezes_is_not_counted_although_the_policy_has_a_formula(monkeypatch):
    speed, said = of(monkeypatch, 1e12, changed=True)
    forward = 3 * 16 + 2 * (2 * 16 * 32) + 16 * 20
    assert speed.tflop(BATCH) * 1e12 == 2 * 4 * (forward + 16 * 20)  # Only the last layer has a gradient.
    assert "plugins have changed what trains" in said[0]
