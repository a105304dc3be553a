"""A recorded run: the model, the optimizer and the schedule together, step by step."""

import json

import numpy as np
import pytest
import torch
from golden import name_of
from pi0_case import read_batch, read_model

from rlinf_core.contract.optim import OptimConfig, TrainedParameter
from rlinf_core.training.state.ema import Ema
from rlinf_core.training.state.optim import Optimizer
from rlinf_plugins_openpi.model.parts import unpacked
from rlinf_plugins_openpi.weights.layouts import JAX
from rlinf_plugins_openpi.weights.source import PublishedWeights

FIRST_LOSSES, LOSSES = 1e-4, 5e-4
GRADIENT_NORM = 1e-3
UPDATE = 5e-3


class Run:
    """The recorded run repeated: losses, gradient norms, learning rates, and small parameters on the way."""

    def __init__(self, folder):
        self.name, self.folder = name_of(folder), folder
        self.curve = json.loads((folder / "curve.json").read_text())
        self.watched = dict(np.load(folder / "watched_params_jax.npz"))
        self.model = read_model((folder / self.curve["init"]).parent)
        self.start = self.now()
        arrays, self.log, self.on_the_way = dict(np.load(folder / "batches.npz")), [], {}
        optimizer, ema = self.optimizer(), Ema(self.model, self.curve["ema_decay"])
        for step in range(self.curve["steps"]):
            prefix = f"batch{self.curve['pool_index'][step]}/"
            batch = read_batch({k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)})
            draws = {key: torch.from_numpy(arrays[key][step]) for key in ("noise", "time")}
            output = self.model(batch | draws)
            output.loss_sum.backward()
            done = optimizer.step(output.weight)
            ema.update(done.skipped)
            loss = output.loss_sum.detach() / output.weight
            self.log.append([float(value) for value in (loss, done.grad_norm, done.lr)])
            self.on_the_way[f"step{step + 1}"] = self.now()
        self.on_the_way["ema_final"] = unpacked(ema.state_dict(), self.model.dimensions)

    def now(self):
        """The published tensors as they are."""
        state = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        return unpacked(state, self.model.dimensions)

    def optimizer(self):
        settings, schedule = self.curve["optimizer"], self.curve["schedule"]
        optim = OptimConfig(
            lr=schedule["peak_lr"],
            min_lr=schedule["decay_lr"],
            warmup_steps=schedule["warmup_steps"],
            decay_steps=schedule["decay_steps"],
            betas=(settings["b1"], settings["b2"]),
            eps=settings["eps"],
            weight_decay=settings["weight_decay"],
            clip_grad=settings["clip_global_norm"],
        )
        trained = [TrainedParameter(*named) for named in self.model.named_parameters()]
        return Optimizer(trained, optim, optim.lr_at, clip_grad=optim.clip_grad)


def distance_under_the_references_name(state, name, theirs, dimensions):
    """max|difference| / max|reference| of all our parameters that the reference keeps under one name."""
    slots = {own: slot for own, slot in JAX.slots(dimensions).items() if slot.key == name}
    assert slots, f"the reference watched {name}, which is no parameter of its model"
    theirs = torch.from_numpy(np.asarray(theirs))
    assert all(slot.stored_shape(state[own].shape) == theirs.shape for own, slot in slots.items())
    off = max(float((state[own] - slot.take(theirs)).abs().max()) for own, slot in slots.items())
    return off / float(theirs.abs().max())


@pytest.fixture
def run(train_case):
    return Run(train_case)


def test_training_follows_the_recorded_run(run, report):
    ours = np.array(run.log).T
    theirs = np.array([run.curve[key] for key in ("loss", "grad_norm_before_clip", "lr")])
    loss, norm, lr = np.abs(ours / theirs - 1)
    report(run.name, "loss, first 5 steps", loss[:5].max(), FIRST_LOSSES)
    report(run.name, f"loss, {len(loss)} steps", loss.max(), LOSSES)
    report(run.name, "gradient norm", norm.max(), GRADIENT_NORM)
    report(run.name, "learning rate", lr.max(), 1e-6)

    after = PublishedWeights(run.folder / "params_after_torch.safetensors", run.model.dimensions)
    off = update = 0.0
    for name, parameter in run.now().items():
        if name.startswith("vision.") and name.endswith("k_proj.bias"):
            continue  # a true gradient of zero: Adam turns its rounding noise into movement
        theirs_after = after.tensor(name)
        off += float((parameter - theirs_after).square().sum())
        update += float((theirs_after - run.start[name]).square().sum())
    report(run.name, f"parameter change, {len(loss)} steps", (off / update) ** 0.5, UPDATE)

    for key, value in run.watched.items():
        when, _, name = key.partition("/")
        now = run.on_the_way[when]
        report(run.name, key, distance_under_the_references_name(now, name, value, run.model.dimensions), UPDATE)
