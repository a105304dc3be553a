"""A third party's dataset: the package of examples/custom_dataset, and all of it from wheels in a clean environment."""

import importlib
import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile

import numpy as np
import pytest
from distributions import ROOT, entry_point, repository_entry_points

from rlinf_core.config.load import load_config
from rlinf_core.plugins.registry import DATASET_GROUP, PLUGIN_GROUP, Plugins
from rlinf_core.testing import check_dataset
from rlinf_plugins_openpi import Pi05Config

PROJECTS = {
    "rlinf_core": ROOT / "rlinf_core",
    "rlinf_plugins_openpi": ROOT / "rlinf_plugins_openpi",
    "sawyer_table": ROOT / "examples" / "custom_dataset",
}
EXAMPLE = PROJECTS["sawyer_table"]
UV = os.environ.get("UV") or shutil.which("uv")
needs_uv = pytest.mark.skipif(not UV, reason="builds wheels with uv")

TOML_ONLY = """
[runner]
name = "toml_only"
max_steps = 2
[data]
config_name = "pi05_custom"
repo_id = "examples/data/metaworld_3tasks"
images = { base_0_rgb = "observation.image" }
state = ["observation.state"]
actions = ["action"]
raw_action_is_delta = true
num_workers = 0
[policy]
variant = "dummy"
[trainer]
device = "cpu"
global_batch_size = 2
micro_batch_size = 2
"""
"""The example's data without the example's package."""


@pytest.fixture(scope="module")
def sawyer():
    """The example's module."""
    sys.path.insert(0, str(EXAMPLE))
    yield importlib.import_module("sawyer_table")
    sys.path.remove(str(EXAMPLE))


def test_the_example_is_short_and_uses_public_names(sawyer):
    lines = [line for line in (EXAMPLE / "sawyer_table.py").read_text().splitlines() if line.strip()]
    assert len(lines) < 30
    imported = [line.split()[1] for line in lines if line.startswith("from ")]
    assert imported == ["dataclasses", "rlinf_core.data.transforms", "rlinf_plugins_openpi"]


def test_the_example_conforms(sawyer):
    dataset = sawyer.SawyerTable(repo_id=str(ROOT / "examples/data/metaworld_3tasks"))
    report = check_dataset(dataset, rows=16, policy=Pi05Config(variant="dummy"))
    assert report.not_checked == ()


def test_the_examples_gripper_is_0_open_to_1_closed(sawyer):
    actions = np.float32([[0.1, 0.2, 0.3, -1], [0.1, 0.2, 0.3, 1]])
    scaled = sawyer.RescaleGripper()({"actions": actions})
    np.testing.assert_array_equal(scaled["actions"][:, 3], [0, 1])
    np.testing.assert_array_equal(scaled["actions"][:, :3], actions[:, :3])
    np.testing.assert_array_equal(sawyer.RescaleGripper().inverse(scaled)["actions"], actions)


def test_the_examples_config_loads_with_its_package(sawyer):
    plugins = Plugins([*repository_entry_points(), entry_point(DATASET_GROUP, "pi05_sawyer_table", sawyer.SawyerTable)])
    assert isinstance(load_config(EXAMPLE / "train.toml", [], plugins).data, sawyer.SawyerTable)


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    """Project -> its wheel."""
    folder = tmp_path_factory.mktemp("wheels")
    for source in PROJECTS.values():
        uv("build", "--wheel", "--out-dir", folder / source.name, source)
    return {name: next((folder / source.name).glob("*.whl")) for name, source in PROJECTS.items()}


def uv(*arguments, **options):
    """Run uv from its cache; what the cache lacks is a reason to skip: tests need no network."""
    command = [UV, *map(str, arguments)]
    result = subprocess.run([*command, "--offline"], capture_output=True, text=True, **options)
    if result.returncode and "offline" in result.stderr.lower():
        pytest.skip(f"uv's cache lacks what `{' '.join(command)}` needs: run that once with a network")
    assert result.returncode == 0, result.stderr
    return result.stdout


def run_python(python, *arguments, path=None):
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment |= {"PYTHONPATH": str(path)} if path else {}
    command = [str(python), *map(str, arguments)]
    result = subprocess.run(command, cwd=path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@needs_uv
@pytest.mark.parametrize("project", PROJECTS)
def test_a_wheel_holds_all_that_its_project_says(project, wheels):
    table = tomllib.loads((PROJECTS[project] / "pyproject.toml").read_text())["project"]
    with zipfile.ZipFile(wheels[project]) as wheel:
        names = wheel.namelist()
        [declared] = [wheel.read(name).decode() for name in names if name.endswith("/entry_points.txt")]
    for group in (PLUGIN_GROUP, DATASET_GROUP):
        for name, value in table.get("entry-points", {}).get(group, {}).items():
            assert f"\n{name} = {value}\n" in declared.partition(f"[{group}]")[2] + "\n"
    source = PROJECTS[project] / "src"
    files = [
        path.relative_to(source) for path in source.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    ]
    assert {str(path) for path in files} <= set(names)
    assert [name for name in names if "test" in name.split("/")[0]] == []
    if source.exists():
        assert f"{project}/py.typed" in names
    if project == "rlinf_plugins_openpi":
        assert "rlinf_plugins_openpi/assets/small_tokenizer.model" in names


@needs_uv
def test_what_is_installed_from_wheels_is_listed_without_the_sources(wheels, tmp_path):
    uv("pip", "install", "--no-deps", "--target", tmp_path, *wheels.values())
    code = "import sys, rlinf_core, rlinf_core.cli; print(rlinf_core.__file__); sys.exit(rlinf_core.cli.main())"
    module, _, listed = run_python(sys.executable, "-c", code, "datasets", "--json", path=tmp_path).partition("\n")
    assert module == str(tmp_path / "rlinf_core" / "__init__.py")
    rows = {row["name"]: row for row in json.loads(listed)}
    assert rows["pi05_sawyer_table"]["distribution"] == "sawyer-table"
    assert rows["pi05_sawyer_table"]["action_dim"] == 4


@needs_uv
@pytest.mark.slow
@pytest.mark.timeout(1200)  # A minute of computing, if nobody else needs the machine.
def test_three_wheels_train_in_a_clean_environment(wheels, tmp_path):
    """The example's format, one that TOML alone describes, and one that `rlinf new-plugin` writes.

    They train in one process: loading torch takes longest.
    """
    frozen = uv("pip", "freeze", "--python", sys.executable).splitlines()
    versions = [line for line in frozen if "==" in line and not line.startswith("-e")]
    (tmp_path / "versions.txt").write_text("\n".join(versions))
    uv("venv", "--python", sys.executable, tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    # Torch is gigabytes: link to the cache's, from whichever disk this is.
    link = ("--link-mode", "symlink", "--constraints", tmp_path / "versions.txt")
    uv("pip", "install", "--python", python, *link, *wheels.values())
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    shutil.rmtree(tmp_path / "examples" / "custom_dataset")
    (tmp_path / "toml_only.toml").write_text(TOML_ONLY)
    new_plugin = ("new-plugin", "sawyer-pick", "--from", "examples/data/metaworld_3tasks")
    run_python(python, "-m", "rlinf_core.cli", *new_plugin, path=tmp_path)
    uv("pip", "install", "--python", python, "--no-deps", "--editable", tmp_path / "sawyer-pick")
    code = "import sys; from rlinf_core.train import main; sys.exit(any(main([config]) for config in sys.argv[1:]))"
    run_python(python, "-c", code, EXAMPLE / "train.toml", "toml_only.toml", "sawyer-pick/train.toml", path=tmp_path)
    for name in ("sawyer_table", "toml_only", "sawyer_pick_try"):
        lines = (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [1, 2]
