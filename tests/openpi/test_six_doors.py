"""One package beside core brings an optimizer, an evaluator, an augmentation, an adapter, a logger and a trainer.

Its modules are the examples of the documentation; a run that uses all of them is started as users start it, continues,
and its policy is exported and loaded without the package.
"""

import json
import re

import numpy as np
import torch
from distributions import ROOT, install, repository_plugins

from rlinf_core.export import Choice, export_run
from rlinf_core.inference import load_policy
from rlinf_core.plugins.registry import Plugins

PAGES = {
    "lion": ("training.md", "class LionConfig"),
    "action_errors": ("training.md", "class ActionErrors"),
    "saturation": ("augmentation.md", "class SaturationConfig"),
    "acme_mlflow": ("loggers.md", "class MlflowConfig"),
    "acme_sharp": ("trainers.md", "class SharpConfig"),
    "acme_sharp_step": ("trainers.md", "class SharpStep"),
}
"""Module -> the page with its source, and what identifies it there."""
MLFLOW = """
import json, os
from types import SimpleNamespace

def set_experiment(name): pass
def log_dict(data, name): pass
def end_run(status): pass
def start_run(**settings):
    return SimpleNamespace(info=SimpleNamespace(run_id="one"))

def log_metrics(metrics, step, synchronous):
    with open(os.environ["NOTES"], "a") as notes:
        print(json.dumps(sorted(metrics)), file=notes)
"""
CONFIG = f"""
[runner]
loggers = ["mlflow"]
evaluators = ["action_errors"]
val_check_interval = 2
val_samples = 2
[loggers.mlflow]
experiment = "doors"
[evaluators.action_errors]
samples = 2
[data]
config_name = "pi05_metaworld"
repo_id = "{ROOT}/examples/data/metaworld_3tasks"
validation_fraction = 0.15
num_workers = 0
[policy]
variant = "dummy"
action_dim = 4
augmentations = ["openpi", "saturation"]
[optim]
type = "lion"
lr = 1e-3
min_lr = 1e-3
warmup_steps = 0
[trainer]
type = "sharp"
rho = 0.1
device = "cpu"
global_batch_size = 2
micro_batch_size = 2
param_dtype = "fp32"
[plugins.low_rank]
rank = 2
"""


def source(module):
    page, sign = PAGES[module]
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.DOTALL)
    [found] = [block for block in blocks if sign in block]
    return found


def test_a_package_opens_all_doors_without_touching_core(tmp_path, start_ranks, monkeypatch):
    site, notes = tmp_path / "site", tmp_path / "notes"
    modules = {name: source(name) for name in PAGES}
    modules["acme_low_rank"] = (ROOT / "tests/support/low_rank.py").read_text(encoding="utf-8")
    plugins = {name: name for name in modules if name != "acme_sharp_step"}
    install(site, "acme-doors", plugins=plugins, mlflow=MLFLOW, **modules)
    (tmp_path / "run.toml").write_text(CONFIG)
    toml, given = str(tmp_path / "run.toml"), [f"runner.output_dir={tmp_path}"]
    for steps in (2, 4):
        options = (toml, *given, f"runner.max_steps={steps}")
        ended = start_ranks("rlinf_core.train:main", 1, *options, paths=(site,), NOTES=str(notes))
        assert ended.returncode == 0, ended.stderr[-3000:]
    logged = [json.loads(line) for line in notes.read_text().splitlines()]
    assert len(logged) == 6  # Four steps, two validations.
    assert {"loss", "grad_norm"} <= set(logged[0])
    assert {"val_loss", "within_tolerance"} <= set(logged[2])
    run = tmp_path / "run"
    assert (run / "evaluations" / "action_errors" / "step_000000004").is_dir()

    monkeypatch.syspath_prepend(str(site))
    export_run(run, tmp_path / "policy", Choice(), Plugins.load())
    loaded = load_policy(tmp_path / "policy", plugins=repository_plugins())  # Merged: the package is not needed.
    names = [name for name, _ in loaded.module.named_parameters()]
    assert not [name for name in names if name.endswith((".up", ".down"))]
    row = {name: np.zeros((48, 48, 3), np.uint8) for name in ("observation.image",)}
    actions = loaded.infer({**row, "task": "push", "observation.state": np.zeros(4, np.float32)})
    assert torch.isfinite(torch.as_tensor(actions)).all()
