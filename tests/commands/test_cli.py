"""The command `rlinf`: its frame, listings, exit codes, and what it does not import."""

import json
import os
import re
import resource
import subprocess
import sys

import pytest
from distributions import ROOT, entry_point, install, repository_plugins

from rlinf_core import DatasetConfig, cli
from rlinf_core.errors import Exit
from rlinf_core.plugins.registry import DATASET_GROUP, PLUGIN_GROUP, Plugins


@pytest.fixture
def rlinf(monkeypatch, capsys):
    """Run the command with these plugins; returns (exit code, stdout, stderr)."""

    def rlinf(plugins, *arguments):
        monkeypatch.setattr("rlinf_core.plugins.registry.get_plugins", lambda: plugins)
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
    libero, custom = rows["pi05_libero"], rows["pi05_custom"]
    assert (libero["repo_id"], libero["action_horizon"]) == ("physical-intelligence/libero", 10)
    assert libero["cameras"] == {"base_0_rgb": "image", "left_wrist_0_rgb": "wrist_image"}
    assert (libero["state"], libero["state_dim"], libero["action_dim"]) == (["state"], None, 7)
    assert (custom["action_horizon"], custom["state_dim"], custom["action_dim"]) == (50, None, None)
    assert not [row for row in rows.values() if "error" in row]


def test_one_name_from_two_distributions_is_listed_in_full(rlinf):
    plugins = Plugins([entry_point(DATASET_GROUP, "pick", DatasetConfig, name) for name in ("lab-a", "lab-b")])
    _, out, _ = rlinf(plugins, "datasets")
    assert "lab-a:pick" in out
    assert "lab-b:pick" in out


def test_plugins_shows_who_registered_what_and_what_failed(rlinf):
    broken = entry_point(PLUGIN_GROUP, "broken", "a_module_that_nobody_has", "lab", "3.1")
    blocked = entry_point(PLUGIN_GROUP, "quiet", "quiet", "quiet")
    formats = [entry_point(DATASET_GROUP, name, DatasetConfig, "only-data") for name in ("pick", "place")]
    plugins = Plugins([broken, blocked, *formats], disabled=["quiet"])
    code, out, _ = rlinf(plugins, "plugins")
    assert code == 0
    assert "failed: lab 3.1 (entry point 'broken = a_module_that_nobody_has')" in out
    assert "disabled by RLINF_DISABLE_PLUGINS: quiet" in out
    assert ["only-data", "1.0", "2"] in [line.split() for line in out.splitlines()]
    code, out, _ = rlinf(repository_plugins(), "plugins")
    assert "trainer fsdp2" in out
    assert "policy pi05" in out


def test_plugins_as_json(rlinf):
    broken = entry_point(PLUGIN_GROUP, "broken", "a_module_that_nobody_has", "lab", "3.1")
    core = entry_point(PLUGIN_GROUP, "rlinf-core", "rlinf_core.plugins.builtin", "rlinf-core", "0.1")
    formats = [entry_point(DATASET_GROUP, name, DatasetConfig, "only-data") for name in ("pick", "place")]
    _, out, _ = rlinf(Plugins([broken, core, *formats]), "plugins", "--json")
    found = json.loads(out)
    assert [one["distribution"] for one in found["plugins"]] == ["rlinf-core"]
    assert {"kind": "trainer", "name": "fsdp2"} in found["plugins"][0]["registers"]
    assert found["datasets"] == [{"distribution": "only-data", "version": "1.0", "count": 2}]
    assert found["failures"][0].pop("cause").startswith("No module named 'a_module_that_nobody_has': reinstall lab")
    entry = "broken = a_module_that_nobody_has"
    assert found["failures"] == [
        {"distribution": "lab", "version": "3.1", "entry_point": entry, "doing": "loading the plugin"}
    ]
    assert found["blocked"] == []


ACME = """
    from rlinf_core import hookimpl
    from rlinf_core.contract.command import Command

    @hookimpl
    def rlinf_register_commands():
        return [
            Command("polish", "polish a policy", "acme_serve"),
            Command("fold", "fold laundry", "acme_fold"),
            Command("plugins", "list something else", "acme_serve"),
            Command("arm", "move the arm", "acme_move"),
        ]
"""
SERVE = """
    def add_arguments(parser):
        parser.add_argument("words", nargs="*")
        parser.add_argument("--end", default="none")

    def run(options):
        if options.end == "code":
            return 7
        if options.end != "none":
            raise {"ctrl-c": KeyboardInterrupt, "defect": ValueError}[options.end](options.end)
        print("serving", *options.words)
"""
ARM = """
    def add_arguments(parser):
        parser.add_subparsers(dest="move").add_parser("up").add_argument("--by", type=int)

    def run(options):
        print(options.move, options.by)
        assert options.plugins.command("arm").help == "move the arm"
"""


@pytest.fixture
def acme(tmp_path, monkeypatch):
    """A plugin with a command that works and one whose module is not there."""
    install(tmp_path, "acme", plugins={"acme": "acme_plugin"}, acme_plugin=ACME, acme_serve=SERVE, acme_move=ARM)
    monkeypatch.syspath_prepend(tmp_path)
    yield Plugins([entry_point(PLUGIN_GROUP, "acme", "acme_plugin", "acme")])
    for module in ("acme_plugin", "acme_serve", "acme_move"):
        sys.modules.pop(module, None)


def test_help_names_every_command_with_its_owner_and_every_exit_code(rlinf, acme):
    code, out, _ = rlinf(acme, "--help")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert code == 0
    assert "polish polish a policy (acme)" in lines
    assert "plugins list plugins, what they registered, and what failed" in lines
    assert "list something else" not in out
    assert "acme_serve" not in sys.modules
    for exit_code in Exit:
        assert any(line.startswith(f"{exit_code:d} ") for line in lines)
    broken = Plugins([entry_point(PLUGIN_GROUP, "broken", "a_module_that_nobody_has", "lab", "3.1")])
    assert "failed: lab 3.1 (entry point 'broken = a_module_that_nobody_has')" in rlinf(broken, "--help")[1]


def test_a_plugins_command_runs_and_its_options_stand_anywhere(rlinf, acme):
    assert rlinf(acme, "polish", "a", "--end", "none", "b")[:2] == (0, "serving a b\n")
    assert rlinf(acme, "polish", "--end=code")[0] == 7
    assert rlinf(acme, "arm", "up", "--by", "3")[1] == "up 3\n"
    with pytest.raises(SystemExit) as caught:
        rlinf(acme, "polish", "--unknown")
    assert caught.value.code == Exit.USER_ERROR


def test_core_comes_first_and_loads_no_plugin(rlinf, acme):
    code, out, _ = rlinf(acme, "datasets")
    assert (code, "acme_plugin" in sys.modules) == (0, False)
    assert "acme 1.0" not in out
    assert "acme_plugin" in rlinf(acme, "plugins")[1]


def test_a_command_that_cannot_be_imported_names_its_owner(rlinf, acme):
    code, _, error = rlinf(acme, "fold")
    assert code == 2
    assert error.startswith("error: the command 'fold' of acme 1.0 (entry point 'acme = acme_plugin') cannot be")
    assert "No module named 'acme_fold'" in error


def test_unknown_commands_are_told_near_names_and_failures(rlinf):
    broken = Plugins([entry_point(PLUGIN_GROUP, "broken", "a_module_that_nobody_has", "lab", "3.1")])
    code, out, error = rlinf(broken, "dataset")
    assert (code, out) == (2, "")
    assert error.splitlines()[:2] == [
        "error: unknown command 'dataset'; did you mean 'datasets' or 'check-dataset'?",
        f"  available: {', '.join(sorted(command.name for command in cli.COMMANDS))}",
    ]
    assert "  failed: lab 3.1 (entry point" in error
    with pytest.raises(SystemExit) as caught:
        cli.main(["--dbug", "datasets"])
    assert caught.value.code == 2


def test_no_command_shows_the_help(rlinf):
    code, out, error = rlinf(repository_plugins())
    assert (code, error) == (0, "")
    assert (code, out, error) == rlinf(repository_plugins(), "--help")
    assert "launch " in out


@pytest.mark.parametrize("name", ["train", "finetune"])
def test_who_looks_for_train_is_shown_launch_and_torchrun(name, rlinf):
    code, _, error = rlinf(repository_plugins(), name, "my run.toml", "seed=1")
    assert code == 2
    assert f"unknown command '{name}': a run is started by `rlinf launch 'my run.toml' seed=1`" in error
    assert "`torchrun --standalone --nproc-per-node N -m rlinf_core.train 'my run.toml' seed=1`" in error
    assert "`rlinf launch CONFIG`" in rlinf(repository_plugins(), name)[2]


def completions(line, tmp_path, **environment):
    """What the tab key offers at the end of a line, and what was printed beside."""
    found = tmp_path / "found"
    shell = {
        "_ARGCOMPLETE": "1",
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
        "_ARGCOMPLETE_STDOUT_FILENAME": found,
    }
    code = "import sys; from rlinf_core.cli import main; sys.argv = ['rlinf']; sys.exit(main())"
    variables = os.environ | {name: str(value) for name, value in (shell | environment).items()}
    result = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True)
    return (found.read_text().split("\x0b") if found.exists() else []), result.stdout + result.stderr


def test_the_tab_key_completes_commands_and_options(tmp_path):
    pytest.importorskip("argcomplete")
    assert [word.strip() for word in completions("rlinf la", tmp_path)[0]] == ["launch"]
    assert "convert" in [word.strip() for word in completions("rlinf ", tmp_path)[0]]
    assert [word.strip() for word in completions("rlinf plan x.toml --ra", tmp_path)[0]] == ["--ranks"]


def test_the_tab_key_completes_keys_behind_options_without_torch(tmp_path):
    pytest.importorskip("argcomplete")
    install(tmp_path, "torch", torch="raise SystemExit('torch was imported')")
    line = f"rlinf plan {ROOT}/examples/quickstart.toml --ranks 2 trainer.compile=true policy.vari"
    found, _ = completions(line, tmp_path, RLINF_CACHE=tmp_path, PYTHONPATH=tmp_path)
    assert [word.strip() for word in found] == ["policy.variant="]


def test_the_tab_key_without_argcomplete_does_nothing(tmp_path):
    install(tmp_path, "argcomplete", argcomplete="raise ImportError")
    assert completions("rlinf la", tmp_path, PYTHONPATH=tmp_path) == ([], "")


def test_user_errors_are_one_message_and_exit_code_2(tmp_path):
    result = run_installed(tmp_path, "datasets", RLINF_STRICT_PLUGINS="maybe")
    assert result.returncode == 2
    assert result.stderr.startswith("error: RLINF_STRICT_PLUGINS is 'maybe'")
    assert "Traceback" not in result.stderr
    result = run_installed(tmp_path, "--debug", "datasets", RLINF_STRICT_PLUGINS="maybe")
    assert result.returncode == 2
    assert "Traceback" in result.stderr


def test_ctrl_c_ends_quietly(rlinf, acme):
    assert rlinf(acme, "polish", "--end=ctrl-c") == (130, "", "")


def test_a_defect_keeps_its_traceback_and_exits_with_1(tmp_path):
    install(tmp_path, "acme", plugins={"acme": "acme_plugin"}, acme_plugin=ACME, acme_serve=SERVE)
    result = run_installed(tmp_path, "polish", "--end=defect")
    assert result.returncode == 1
    assert "Traceback" in result.stderr
    assert "ValueError: defect" in result.stderr


def test_a_reader_may_leave_early():
    command = [sys.executable, "-c", "import sys; from rlinf_core.cli import main; sys.exit(main())", "datasets"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 0


def test_a_person_reads_tables_and_errors_in_color(monkeypatch, capsys):
    from rlinf_core.commands import output

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.delenv("NO_COLOR", raising=False)
    for stream in (sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: True)
    output.print_table(["name", "what"], [["pick[/]", "word " * 10]])
    output.print_error("no [bold]file[/bold] here")
    out, error = capsys.readouterr()
    assert "\x1b[1m" in out
    assert "pick[/]" in out
    assert len(out.splitlines()) > 2
    assert error.endswith("no [bold]file[/bold] here\n")
    assert "\x1b[1;31m" in error


def test_progress_without_a_terminal_is_a_line_a_minute_with_an_eta(monkeypatch, capsys):
    from rlinf_core import terminal

    clock = iter([0.0, 10.0, 61.0, 70.0, 130.0])
    monkeypatch.setattr(terminal.time, "monotonic", lambda: next(clock))
    with terminal.print_progress("converting", "parts") as progress:
        for done in (1, 2, 3, 4):
            progress(done, 400)
    assert capsys.readouterr() == (
        "",
        "converting: 2 of 400 parts, ETA 3:22:19\nconverting: 4 of 400 parts, ETA 3:34:30\n",
    )


def test_progress_on_a_terminal_is_a_bar(monkeypatch, capsys):
    from rlinf_core import terminal

    monkeypatch.setattr(terminal.sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "100")
    with terminal.print_progress("checking", "files") as progress:
        progress(0, 8)
        progress(3, 8)
    assert "3/8 files ETA" in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err)


def test_version(tmp_path):
    install(tmp_path, "rlinf-core", version="7.8.9")
    result = run_installed(tmp_path, "--version")
    assert (result.returncode, result.stdout) == (0, "rlinf-core 7.8.9\n")


def seconds(code):
    """The CPU time of a fresh interpreter, which other work on this machine hardly changes."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_listing_takes_a_fraction_of_importing_torch():
    listing = min(seconds("from rlinf_core.cli import main; main(['datasets'])") for _ in range(3))
    assert listing < seconds("import torch") / 3


def test_importing_the_package_leaves_torch_unloaded():
    code = "import sys, rlinf_core; rlinf_core.RunConfig, rlinf_core.PolicyConfig; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
