"""The configs in examples/sft: complete, valid, and started on made-up data for two steps by the small variant."""

import json
import re

import pytest
from distributions import ROOT, repository_plugins
from format_rows import widths_of, write_format_dataset

from rlinf_core.config.load import load_config
from rlinf_core.data.loading.sampling import check_batch
from rlinf_core.preflight import check_run
from rlinf_core.training.distributed.processes import processes
from rlinf_core.training.run_folder import prepare_folder

FOLDER = ROOT / "examples" / "sft"
FILES = sorted(FOLDER.glob("*.toml"))
QUICK = ("libero_sft_openpi", "maniskill_sim_real_co_training", "realworld_sft_openpi_dual_franka_tcp_rot6d")
SMALL = (
    *("policy.variant=dummy", "policy.weights=random", "policy.tokenizer=", "policy.num_sampling_steps=1"),
    *("runner.max_steps=2", "runner.save_interval=2", "data.num_workers=0"),
    *("trainer.device=cpu", "trainer.param_dtype=fp32", "trainer.global_batch_size=2", "trainer.micro_batch_size=1"),
)
GUIDE = {
    *("pi0_maniskill", "pi05_maniskill", "pi0_libero", "pi05_libero", "pi0_aloha_robotwin", "pi0_realworld"),
    *("pi05_metaworld", "pi05_calvin", "pi0_custom"),
}
"""The formats in the tables of RLinf's guide."""


def each(test):
    return pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)(test)


def load(file, *overrides):
    return load_config(file, overrides, repository_plugins())


def test_every_format_of_the_guide_has_an_example():
    formats = {source.run.data.config_name for file in FILES for source in load(file).sources}
    assert formats > GUIDE
    assert {"libero_sft_openpi", "custom_sft_openpi", "realworld_sft_openpi", "robotwin_sft_openpi"} < {
        file.stem for file in FILES
    }
    assert {*QUICK} < {file.stem for file in FILES}


@each
def test_the_head_has_commands_hardware_recipe_and_result(file):
    text, run = file.read_text(encoding="utf-8"), load(file)
    head = re.match(r"(# .*\n|#\n)+", text)[0]
    commands = re.findall(r"^#   (rlinf launch .*)$", head, re.MULTILINE)
    assert commands[0] == f"rlinf launch {file.relative_to(ROOT)}"
    for label in ("Hardware", "Recipe", "Expected"):
        assert f"\n# {label}: " in head
    assert re.search(r"eight GPUs, \d+ GB per GPU by `rlinf plan`", head)
    several = load(file, *commands[1].split()[3:])
    for cluster, machines in ((run.cluster, 1), (several.cluster, 2)):
        assert cluster.num_nodes == machines
        check_batch(run.trainer.global_batch_size, run.trainer.micro_batch_size, 8 * machines)
    assert run.runner.name == file.stem
    assert run.policy.variant == "base"


def small(file, tmp_path, made):
    """The config on made-up data in its own columns."""
    overrides = [*SMALL, f"runner.output_dir={tmp_path / 'runs'}"]
    sources = load(file).sources
    for number, source in enumerate(sources):
        data = source.run.data
        key = (*data.images.values(), *widths_of(data).items())
        if key not in made:
            made[key] = write_format_dataset(tmp_path / f"data{number}", data)
        place = f"data.mixture.{number}" if len(sources) > 1 else "data"
        overrides.append(f"{place}.repo_id={made[key].root}")
    return load(file, *overrides)


@pytest.fixture(scope="module")
def made():
    """Datasets by their columns."""
    return {}


def check_and_start(name, tmp_path, made):
    run = small(FOLDER / f"{name}.toml", tmp_path, made)
    plugins = repository_plugins()
    assert check_run(run, plugins, 1).findings == []
    with pytest.MonkeyPatch.context() as patch, processes("cpu") as group:
        patch.delenv("RANK", raising=False)
        trainer = run.trainer.build(run, start=prepare_folder(run, overwrite=False), group=group, plugins=plugins)
        trainer.train()
    steps = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in steps if "loss" in row]
    assert len(losses) == 2
    assert all(0 < loss < 1e3 for loss in losses)


@pytest.mark.parametrize("name", QUICK)
def test_it_validates_and_trains_two_steps(name, tmp_path, made):
    check_and_start(name, tmp_path, made)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({file.stem for file in FILES} - {*QUICK}))
def test_the_others_validate_and_train_two_steps(name, tmp_path, made):
    check_and_start(name, tmp_path, made)
