"""The oldest and the newest versions that the projects allow, each in an environment of its own.

`pytest -m slow tests/test_versions.py -s` shows what was installed and how many tests passed.
"""

import os
import re
import shutil
import subprocess
import sys
import tomllib

import pytest
from distributions import ROOT

UV = os.environ.get("UV") or shutil.which("uv")
TESTS = (
    *(
        "test_torch_names.py",
        "numerics",
        "training/state/test_optim.py",
        "training/test_trainer.py",
        "training/checkpoint",
    ),
    *("costs", "openpi/model/test_packing.py", "data/lerobot/test_lerobot_reader.py", "data/images"),
    "text/test_text_model.py",
)
"""What meets other libraries most, and takes a few minutes."""
SHOWN = ("torch", "torchcodec", "lerobot", "numpy", "av", "pillow", "pyarrow", "transformers", "tokenizers", "datasets")
ENDS = {
    "oldest": (["torch==2.11.*", "lerobot==0.6.1"], []),
    # The openpi plugin brings lerobot, which holds torch back. Overrides replace what others ask for.
    "newest": ([], ["lerobot; sys_platform == 'never'"]),
}
"""End -> what to install besides the projects, and which requirements to replace."""


def project(folder):
    return tomllib.loads((ROOT / folder / "pyproject.toml").read_text())


def uv(*arguments):
    """Run uv; where it cannot download what its cache lacks, skip."""
    result = subprocess.run([UV, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True)
    if result.returncode and re.search(r"failed to fetch|offline|dns error|error sending request", result.stderr, re.I):
        pytest.skip(f"no network, and uv's cache lacks what it needs: {result.stderr.strip().splitlines()[-1]}")
    assert result.returncode == 0, result.stderr
    return result.stdout


def install(environment, requirements, overrides, folder):
    """An environment with the projects as they are here; returns its Python and its versions."""
    uv("venv", "--python", sys.executable, environment)
    python = environment / "bin" / "python"
    (folder / "overrides.txt").write_text("\n".join(overrides))
    tools = [one for one in project(".")["dependency-groups"]["test"] if isinstance(one, str)]
    projects = ["-e", "rlinf_core[inspect]", "-e", "rlinf_plugins_openpi", "-e", "plugins/rlinf_plugins_text"]
    given = ["--python", python, "--overrides", folder / "overrides.txt", "--link-mode", "symlink"]
    uv("pip", "install", *given, *projects, *tools, "scipy", *requirements)
    versions = dict(line.split("==") for line in uv("pip", "freeze", "--python", python).splitlines() if "==" in line)
    return python, versions


def test_what_is_run_exists():
    assert [name for name in TESTS if not (ROOT / "tests" / name).exists()] == []


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not UV, reason="installs with uv")
@pytest.mark.parametrize("end", ENDS)
def test_the_ends_of_what_is_allowed(end, tmp_path, video_dataset, image_dataset):
    requirements, overrides = ENDS[end]
    python, versions = install(tmp_path / "venv", requirements, overrides, tmp_path)
    assert ("lerobot" in versions) == (end == "oldest")
    # Datasets that this environment's lerobot has written, as the other may have none.
    environment = os.environ | {"RLINF_TEST_DATASETS": str(image_dataset.root.parent)}
    environment.pop("VIRTUAL_ENV", None)
    command = [python, "-m", "pytest", "-n", "0", "-q", "-rs", "-p", "no:cacheprovider"]
    command += [f"tests/{name}" for name in TESTS]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    print(end, {name: versions.get(name) for name in SHOWN})
    print(*[line for line in result.stdout.splitlines() if re.match(r"SKIPPED|\d+ passed|.* failed", line)], sep="\n")
    assert result.returncode == 0, result.stdout[-20_000:] + result.stderr[-2000:]
    skipped = [line for line in result.stdout.splitlines() if line.startswith("SKIPPED")]
    assert [line for line in skipped if "lerobot" not in line] == []


def test_core_needs_no_lerobot_and_torch_has_one_range():
    tables = [project(name)["project"] for name in ("rlinf_core", "rlinf_plugins_openpi", "plugins/rlinf_plugins_text")]
    core = tables[0]
    assert not any(one.startswith("lerobot") for one in core["dependencies"])
    [extra] = core["optional-dependencies"]["lerobot"]
    assert extra.startswith("lerobot[dataset]>=")
    assert any(one.startswith("rlinf-core[lerobot]") for one in tables[1]["dependencies"])
    ranges = {one for table in tables for one in table["dependencies"] if re.match(r"torch\W", one)}
    assert ranges == {"torch>=2.11,<3"}
