"""Imported recipes against RLinf's mathematics: what the network sees of a row, and the learning rate of a step."""

import math

import numpy as np
import pytest
import torch
from distributions import repository_plugins
from rlinf_recipes import ADAM, ALL, write_folder, write_recipe
from test_transforms import OURS, TOLERANCE, Case, distance
from transformers.optimization import get_cosine_with_min_lr_schedule_with_warmup

from rlinf_core.config.load import load_config
from rlinf_plugins_openpi.recipes.hydra_files import read_recipe
from rlinf_plugins_openpi.recipes.import_rlinf import render
from rlinf_plugins_openpi.recipes.translate import translate

STEPS = (0, 1, 2, 499, 500, 999, 1000, 1001, 1999, 12_345, 19_999, 29_999)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("sft"))


def imported_optim(config, tmp_path, kind, monkeypatch, **changes):
    monkeypatch.setenv("DUAL_FRANKA_DATA_ROOT", "/data/dual")
    monkeypatch.setenv("PI05_BASE_CKPT", "/models/pi05")
    overrides = ["actor.model.openpi.use_rlt=False"] if kind.endswith("rlt") else []
    recipe = read_recipe(write_recipe(config, f"numbers_{kind}", kind, **changes), overrides)
    (file := tmp_path / "run.toml").write_text(render(recipe, translate(recipe, {})))
    optim = {path[-1]: value for path, value in recipe.leaves.items() if path[:2] == ("actor", "optim")}
    return load_config(file, plugins=repository_plugins()).optim, optim


def same(expected, lr):
    """Equal to float32's rounding of the peak, in which the rate of a step is computed."""
    return pytest.approx(expected, rel=1e-5, abs=1e-6 * lr)


def theirs(optim):
    """RLinf's schedule: a function of the step for its own, transformers' scheduler for `cosine`."""
    name, lr = optim.get("lr_scheduler", "constant"), optim["lr"]
    total, warmup = optim.get("total_training_steps", 0), optim.get("lr_warmup_steps", -1)
    warmup = int(optim.get("lr_warmup_steps_ratio", 0.0) * total) if warmup < 0 else warmup
    if name == "cosine":
        optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=lr)
        scheduler = get_cosine_with_min_lr_schedule_with_warmup(
            optimizer, warmup, total, num_cycles=0.5, min_lr=optim["min_lr"]
        )
        return {step: lr * scheduler.lr_lambdas[0](step) for step in STEPS if step <= total}  # It rises again after.
    if name == "constant":
        return {step: lr * (step / max(1, warmup) if step < warmup else 1.0) for step in STEPS}

    def openpi(step):
        if step < warmup:
            first = 1 / (warmup + 1)
            return first + (1 - first) * step / max(1, warmup)
        progress = min(1.0, (step - warmup) / max(1, total - warmup))
        least = optim["min_lr"] / lr
        return least + (1 - least) * 0.5 * (1 + math.cos(math.pi * progress))

    return {step: lr * openpi(step) for step in STEPS}


@pytest.mark.parametrize("kind", [kind for kind in ALL if kind != "behavior"])
def test_every_step_of_an_imported_recipe_has_rlinfs_learning_rate(config, tmp_path, kind, monkeypatch):
    ours, optim = imported_optim(config, tmp_path, kind, monkeypatch)
    for step, expected in theirs(optim).items():
        assert float(ours.lr_at(torch.tensor(step))) == same(expected, optim["lr"]), step
    assert (ours.betas, ours.eps) == ((0.9, 0.95), 1e-8)
    assert ours.weight_decay == optim.get("weight_decay", 0.01)
    assert ours.clip_grad == 1.0


OTHERS = {
    "ratio": "lr_warmup_steps_ratio: 0.1\ntotal_training_steps: 30000\nlr_scheduler: cosine\nmin_lr: 1e-6",
    "plain cosine": "lr_warmup_steps: 500\ntotal_training_steps: 30000\nlr_scheduler: cosine\nmin_lr: 0.0",
    "reference": "lr_warmup_steps: 500\ntotal_training_steps: 30000\nlr_scheduler: ref_warmup_cosine\nmin_lr: 1e-6",
    "warm constant": "lr_warmup_steps: 500\nlr_scheduler: constant",
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_schedules_have_rlinfs_learning_rate(config, tmp_path, name, monkeypatch):
    optim = ADAM + "lr: 1e-4\nweight_decay: 0.1\n" + OTHERS[name]
    ours, given = imported_optim(config, tmp_path, "custom", monkeypatch, optim=optim, steps=30000)
    for step, expected in theirs(given).items():
        assert float(ours.lr_at(torch.tensor(step))) == same(expected, 1e-4), step


def test_schedules_of_pytorch_have_its_learning_rate(config, tmp_path, monkeypatch):
    optim = ADAM + "lr: 1e-4\nlr_scheduler: torch_cosine\ntotal_training_steps: 30000"
    ours, _ = imported_optim(config, tmp_path, "custom", monkeypatch, optim=optim, steps=30000)
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=1e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=30000, eta_min=1e-6)
    for step in range(1000):
        if step in STEPS:
            assert float(ours.lr_at(torch.tensor(step))) == same(optimizer.param_groups[0]["lr"], 1e-4), step
        optimizer.step()
        scheduler.step()
    constant, _ = imported_optim(config, tmp_path, "custom", monkeypatch, optim=optim.replace("cosine", "constant"))
    assert float(constant.lr_at(torch.tensor(0))) == pytest.approx(1e-4)


@pytest.mark.parametrize(
    ("kind", "name", "overrides"),
    [
        ("libero", "pi0_libero", []),
        ("libero", "pi05_libero", ["actor.model.openpi.config_name=pi05_libero"]),
        ("realworld", "pi0_realworld", []),
        ("custom", "pi0_custom", []),
        ("custom", "pi0_custom+extra_delta_transform=True", ["+actor.model.openpi_data.extra_delta_transform=True"]),
        ("robotwin", "pi0_aloha_robotwin", []),
        ("robotwin_pi05", "pi05_aloha_robotwin", []),
        ("custom", "pi05_calvin", ["actor.model.openpi.config_name=pi05_calvin"]),
        ("custom", "pi05_metaworld", ["actor.model.openpi.config_name=pi05_metaworld"]),
        ("custom", "pi05_maniskill", ["actor.model.openpi.config_name=pi05_maniskill"]),
    ],
)
def test_rows_of_an_imported_recipe_are_encoded_as_rlinf_recorded_it(config, kind, name, overrides):
    case = Case(OURS / "transforms" / name)
    recipe = read_recipe(write_recipe(config, "golden", kind), overrides)
    tables = translate(recipe, {}).tables
    fields = {key: value for key, value in tables["data"].items() if key not in ("repo_id", "assets", "num_workers")}
    case.dataset = type(case.dataset)(**fields)
    policy = {key: value for key, value in tables["policy"].items() if key not in ("weights", "tokenizer")}
    case.policy = case.policy.model_copy(update=policy)
    assert case.policy.action_horizon == case.meta["action_horizon_config"]
    for stage, sample in case.encode():
        recorded = case.stage(stage)
        for key in ("state", "actions"):
            assert distance(sample[key], recorded[key]) <= TOLERANCE, (stage, key)
    assert np.array_equal(sample["tokens"], recorded["tokenized_prompt"])
    for stage, sample in case.decode():
        recorded = case.stage(stage)
        assert all(distance(sample[key], recorded[key]) <= TOLERANCE for key in recorded), stage
