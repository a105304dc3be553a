"""The command `rlinf`: listings, exit codes, and what it does not import."""

import json
import os
import subprocess
import sys

import pytest
from distributions import entry_point, install, repository_plugins

from rlinf_core import DatasetConfig, cli
from rlinf_core.plugins import DATASET_GROUP, Plugins


@pytest.fixture
def rlinf(monkeypatch, capsys):
    """Run the command with these plugins; returns (exit code, stdout, stderr)."""

    def rlinf(plugins, *arguments):
        monkeypatch.setattr(cli, "get_plugins", lambda: plugins)
        code = cli.main(arguments)
        return code, *capsys.readouterr()

    return rlinf


def run_installed(site, *arguments, **environment):
    """Run the command in a process of its own, with a folder of distributions on its path."""
    path = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
    code = (
        "import sys; from rlinf_core.cli import main; code = main(sys.argv[1:]); "
        "print(sorted({'torch', 'acme_data', 'acme_other'} & set(sys.modules)), file=sys.stderr); sys.exit(code)"
    )
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=os.environ | {"PYTHONPATH": path} | environment,
        capture_output=True,
        text=True,
    )


DATA = '''
    from rlinf_core import DatasetConfig

    class Data(DatasetConfig):
        """Picks things.

        At length.
        """

        run_defaults = {"policy": {"type": "arm"}}
        repo_id: str = "lab/pick"
'''


def test_listing_datasets_imports_none_of_them(tmp_path):
    install(tmp_path, "acme", datasets={"acme_pick": "acme_data:Data", "acme_lost": "acme_other:Data"}, acme_data=DATA)
    result = run_installed(tmp_path, "datasets")
    assert (result.returncode, result.stderr.strip()) == (0, "[]")
    rows = [line.split() for line in result.stdout.splitlines()]
    assert ["acme_pick", "acme", "1.0"] in rows
    assert ["acme_lost", "acme", "1.0"] in rows


@pytest.mark.parametrize("option", ["--json", "--details"])
def test_details_come_without_torch_and_a_broken_dataset_is_a_row(tmp_path, option):
    install(tmp_path, "acme", datasets={"acme_pick": "acme_data:Data", "acme_lost": "acme_other:Data"}, acme_data=DATA)
    result = run_installed(tmp_path, "datasets", option)
    assert (result.returncode, result.stderr.strip()) == (0, "['acme_data']")
    for part in ("arm", "lab/pick", "Picks things.", "No module named 'acme_other'"):
        assert part in result.stdout
    assert result.stdout.count("No module named 'acme_other'") == 1
    assert "At length" not in result.stdout


def test_datasets_as_json(rlinf):
    code, out, _ = rlinf(repository_plugins(), "datasets", "--json")
    rows = {row["name"]: row for row in json.loads(out)}
    assert code == 0
    assert rows["pi05_metaworld"]["policy"] == "pi05"
    assert rows["pi05_metaworld"]["distribution"] == "rlinf-plugins-openpi"
    assert not [row for row in rows.values() if "error" in row]


def test_one_name_from_two_distributions_is_listed_in_full(rlinf):
    plugins = Plugins([entry_point(DATASET_GROUP, "pick", DatasetConfig, name) for name in ("lab-a", "lab-b")])
    _, out, _ = rlinf(plugins, "datasets")
    assert "lab-a:pick" in out
    assert "lab-b:pick" in out


def test_plugins_shows_who_registered_what_and_what_failed(rlinf):
    broken = entry_point("rlinf.plugins", "broken", "a_module_that_nobody_has", "lab", "3.1")
    blocked = entry_point("rlinf.plugins", "quiet", "quiet", "quiet")
    plugins = Plugins([broken, blocked], disabled=["quiet"])
    code, out, _ = rlinf(plugins, "plugins")
    assert code == 0
    assert "failed: lab 3.1 (entry point 'broken = a_module_that_nobody_has')" in out
    assert "left out by RLINF_DISABLE_PLUGINS: quiet" in out
    code, out, _ = rlinf(repository_plugins(), "plugins")
    assert "trainer fsdp2" in out
    assert "policy pi05" in out


def test_user_errors_are_one_message_and_exit_code_2(tmp_path):
    result = run_installed(tmp_path, "datasets", RLINF_STRICT_PLUGINS="maybe")
    assert result.returncode == 2
    assert result.stderr.startswith("error: RLINF_STRICT_PLUGINS is 'maybe'")
    assert "Traceback" not in result.stderr
    result = run_installed(tmp_path, "--debug", "datasets", RLINF_STRICT_PLUGINS="maybe")
    assert "Traceback" in result.stderr


@pytest.mark.parametrize("arguments", [["dataset"], []])
def test_unknown_commands_exit_with_2(arguments):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2


def test_version(tmp_path):
    install(tmp_path, "rlinf-core", version="7.8.9")
    result = run_installed(tmp_path, "--version")
    assert (result.returncode, result.stdout) == (0, "rlinf-core 7.8.9\n")
