"""A third party's policy: the package of examples/custom_policy, which is neither a VLA nor a language model."""

import os
import re
import subprocess
import sys

import pytest
from distributions import ROOT, entry_point, repository_entry_points

from rlinf_core.config.load import load_config
from rlinf_core.export import Choice, export_run
from rlinf_core.inference import load_policy
from rlinf_core.loggers.jsonl import read_rows
from rlinf_core.plugins.registry import DATASET_GROUP, PLUGIN_GROUP, Plugins
from rlinf_core.testing import check_dataset, check_policy
from rlinf_core.training.distributed.processes import processes
from rlinf_core.training.run_folder import prepare_folder

FOLDER = ROOT / "examples" / "custom_policy"


@pytest.fixture
def package(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import chunk_cloning

    return chunk_cloning


@pytest.fixture
def plugins(package):
    own = [
        entry_point(PLUGIN_GROUP, "chunk-cloning", package, "chunk-cloning"),
        entry_point(DATASET_GROUP, "cloning_metaworld", package.CloningMetaworld, "chunk-cloning"),
    ]
    return Plugins([*repository_entry_points(), *own], strict=True)


@pytest.mark.parametrize("file", ["custom_policy/chunk_cloning.py", "custom_dataset/sawyer_table.py"])
def test_a_plugin_beside_its_model_has_fewer_than_60_lines(file):
    lines = (FOLDER.parent / file).read_text(encoding="utf-8").splitlines()
    assert len([line for line in lines if line.strip()]) < 60


@pytest.mark.slow
def test_a_type_checker_accepts_the_plugin_and_finds_mistakes(tmp_path):
    """mypy in strict mode: the package as it is, then with a misspelled method and a module that is no policy."""
    mistakes = (
        "from typing import override\n\nfrom torch import nn\n\nfrom rlinf_core import Policy, PolicyConfig\n\n\n"
        "class Mine(PolicyConfig):\n    @override\n    def describes(self) -> None: ...\n\n"
        "    def useful_flops(self) -> float:\n        return 1.0\n\n"
        "    def build(self) -> Policy:\n        return nn.Linear(1, 1)\n"
    )
    (tmp_path / "mistakes.py").write_text(mistakes)
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", f"--cache-dir={tmp_path / 'cache'}"]
    files = [str(FOLDER / "chunk_cloning.py"), str(tmp_path / "mistakes.py")]
    config = tmp_path / "mypy.ini"
    config.write_text("[mypy]\nplugins = pydantic.mypy\n[mypy-chunk_cloning_model]\nignore_errors = True\n")
    path = os.pathsep.join(str(ROOT / name) for name in ("rlinf_core/src", "rlinf_plugins_openpi/src"))
    result = subprocess.run(
        [*command, f"--config-file={config}", *files],
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": path},
        capture_output=True,
        text=True,
    )
    errors = [line for line in result.stdout.splitlines() if ": error: " in line]
    assert [re.search(r"\[([a-z-]+)\]$", line)[1] for line in errors] == ["misc", "override", "return-value"], result
    assert all(line.startswith("mistakes.py:") for line in errors)


def test_policy_and_dataset_conform(package, plugins):
    check_policy(package.ChunkCloningConfig(state_dim=7, action_dim=7))
    check_dataset(
        package.CloningMetaworld(repo_id=str(ROOT / "examples/data/metaworld_3tasks")), rows=8, plugins=plugins
    )


def test_it_trains_exports_and_acts(plugins, tmp_path, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    small = ["runner.max_steps=16", "runner.val_check_interval=16", "runner.val_samples=4", "optim.warmup_steps=0"]
    given = [f"runner.output_dir={tmp_path}", "trainer.global_batch_size=8", "trainer.micro_batch_size=8", *small]
    run = load_config(FOLDER / "train.toml", given, plugins)
    with processes("cpu") as group:
        run.trainer.build(run, start=prepare_folder(run, overwrite=False), group=group, plugins=plugins).train()
    rows = read_rows(run.folder / "metrics.jsonl")
    losses = [row["loss"] for row in rows if "loss" in row]
    assert sum(losses[-4:]) < sum(losses[:4])
    assert any("val_action_mse" in row for row in rows)
    export_run(run.folder, tmp_path / "policy", Choice(), plugins)
    policy = load_policy(tmp_path / "policy", plugins=plugins)
    source = plugins.hook.rlinf_open_dataset(dataset=run.data, policy=run.policy, split="validation")
    (row,) = source.__getitems__([0])
    assert policy.infer(row).shape == (5, 4)


def test_the_tutorial_quotes_the_package():
    page = (ROOT / "docs" / "tutorial_policy.md").read_text(encoding="utf-8")
    for path in FOLDER.glob("*.py"):
        body = path.read_text(encoding="utf-8").strip()
        assert body in page, f"docs/tutorial_policy.md differs from {path.name}"
