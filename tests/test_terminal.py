"""Text on narrow terminals and on those without UTF-8."""

import io
import json
import os
import subprocess
import sys
import unicodedata

import pytest
from rich.console import Console
from rich.table import Table

from rlinf_core import cli
from rlinf_core.loggers.console import loss_plot
from rlinf_core.terminal import in_ascii, replace_unprintable, wrap

LONG = "optim.lr: must be larger than 0 [/a/long/path/that/nobody/should/have/to/put/together/again/run.toml]"


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def columns(monkeypatch):
    return lambda number: monkeypatch.setenv("COLUMNS", str(number))


def test_a_narrow_terminal_breaks_lines_at_words(columns):
    columns(44)
    text = f"error: 2 mistakes:\n  {LONG}\n  short"
    assert wrap(text, Terminal()).splitlines() == [
        "error: 2 mistakes:",
        "  optim.lr: must be larger than 0",
        "    [/a/long/path/that/nobody/should/have/to/put/together/again/run.toml]",
        "  short",
    ]
    columns(200)
    assert wrap(text, Terminal()) == text


def test_pipes_and_tiny_terminals_get_lines_as_they_are(columns):
    columns(44)
    assert wrap(LONG, io.StringIO()) == LONG
    columns(10)
    assert wrap(LONG, Terminal()) == LONG


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_every_encoding_prints(encoding):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    replace_unprintable([stream, None])
    table = Table("π0.5", "error²")
    table.add_row("…", "±1")
    Console(file=stream, width=60).print(table)
    print(loss_plot([{"step": step, "loss": step} for step in range(9)]), "日", file=stream)
    stream.flush()
    text = stream.buffer.getvalue().decode(encoding)
    if encoding == "ascii":
        assert "pi0.5" in text
        assert "error^2" in text
        assert "training loss" in text
        assert "*" in text
    if encoding == "latin-1":
        assert "error²" in text
        assert "pi0.5" in text
    if encoding == "utf-8":
        assert "日" in text
        assert "π0.5" in text


def test_what_messages_contain_has_a_likeness_in_ascii(pytestconfig):
    folders = ("rlinf_core/src", "rlinf_plugins_openpi/src", "plugins/rlinf_plugins_text/src")
    sources = [path for folder in folders for path in (pytestconfig.rootpath / folder).rglob("*.py")]
    found = {c for path in sources for c in path.read_text(encoding="utf-8") if ord(c) > 127}
    assert {c for c in found if in_ascii(c) == "?" and unicodedata.category(c) != "Lo"} == set()


def test_commands_announce_phases_to_people_only(monkeypatch, capsys):
    validate = ["validate", "examples/quickstart.toml"]
    assert cli.main([*validate, "--json"]) == 0
    alone = capsys.readouterr()
    assert alone.err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert cli.main([*validate, "--json"]) == 0
    watched = capsys.readouterr()
    assert watched.err.splitlines() == ["loading plugins and the config ...", "checking data, statistics and files ..."]
    assert json.loads(watched.out) == json.loads(alone.out)


@pytest.mark.parametrize("variables", [{"PYTHONIOENCODING": "ascii"}, {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0"}])
def test_commands_end_well_without_utf8(variables):
    code = "import sys; from rlinf_core.cli import main; sys.exit(main(sys.argv[1:]))"
    run = [sys.executable, "-c", code, "datasets", "--details"]
    result = subprocess.run(run, env=os.environ | {"PYTHONCOERCECLOCALE": "0"} | variables, capture_output=True)
    assert (result.returncode, result.stderr) == (0, b"")
    assert b"pi0" in result.stdout
    assert result.stdout.isascii()
