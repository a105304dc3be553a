"""Where the output cannot be written, every command says so in one message that names what was asked for."""

from pathlib import Path

import pytest
from distributions import repository_plugins

from rlinf_core import UserError, cli
from rlinf_core.files import check_writable, writing

ROOT = Path(__file__).parents[1]
QUICKSTART = str(ROOT / "examples" / "quickstart.toml")
STATISTICS = '{"norm_stats": {"state": {"mean": [0.0], "std": [1.0], "q01": [-1.0], "q99": [1.0]}}}'


@pytest.fixture
def command(monkeypatch, capsys):
    """Run a command; returns (exit code, what it printed)."""
    monkeypatch.setattr("rlinf_core.plugins.registry.get_plugins", repository_plugins)

    def command(*arguments):
        code = cli.main([str(argument) for argument in arguments])
        return code, "".join(capsys.readouterr())

    return command


@pytest.fixture
def file(tmp_path):
    """A file where a folder is wanted."""
    path = tmp_path / "notes.txt"
    path.write_text("x")
    return path


@pytest.mark.parametrize("name", ["launch", "validate"])
@pytest.mark.parametrize("below", ["", "runs"])
def test_a_run_is_refused_before_it_starts(command, file, name, below):
    code, said = command(name, QUICKSTART, f"runner.output_dir={file / below}")
    assert code == 2
    assert f"runner.output_dir = {str(file / below)!r} cannot hold the run 'quickstart': {file} is not a folder" in said


def test_a_file_in_the_place_of_the_runs_folder_is_named(command, tmp_path):
    (tmp_path / "quickstart").touch()
    for name in ("launch", "validate"):
        code, said = command(name, QUICKSTART, f"runner.output_dir={tmp_path}")
        assert code == 2
        assert "cannot hold the run" in said


def test_validate_makes_nothing(command, tmp_path):
    assert command("validate", QUICKSTART, f"runner.output_dir={tmp_path / 'a' / 'b'}")[0] == 0
    assert list(tmp_path.iterdir()) == []


def test_every_output_names_what_was_asked_for(command, file, tmp_path):
    (tmp_path / "norm_stats.json").write_text(STATISTICS)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text((ROOT / "examples" / "quickstart.toml").read_text())
    out = file / "x" / "y"
    imported = ["--import", tmp_path / "norm_stats.json", "--from=openpi"]
    for arguments in (
        ["norm-stats", QUICKSTART],
        ["norm-stats", *imported],
        ["inspect", QUICKSTART],
        ["export", tmp_path / "run"],
        ["convert", tmp_path],
        ["new-plugin", "arm-pick", "--from", ROOT / "tests"],
    ):
        code, said = command(*arguments, "--output", out)
        assert code == 2, arguments
        assert said.startswith(f"error: {out} cannot be written: {file} is not a folder. Name another f"), arguments
    assert f"error: {file} cannot be written" in command("convert", tmp_path, "--output", file)[1]
    assert "cannot be written: Is a directory" in command("norm-stats", *imported, "--output", tmp_path)[1]


def test_without_permission_nothing_is_tried(monkeypatch, tmp_path):
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path)  # The superuser may do everything.
    with pytest.raises(UserError, match=f"a/b cannot be written: {tmp_path} is not writable for you"):
        check_writable(tmp_path / "a" / "b", "Go elsewhere")
    (tmp_path / "a").mkdir()
    check_writable(tmp_path / "a" / "b", "Go elsewhere")
    check_writable(tmp_path / "a" / "b", "Go elsewhere", file=True)


def test_files_aside_are_not_named_and_files_that_are_missing_are(tmp_path):
    aside = pytest.raises(UserError, match=r"out cannot be written: No such file or directory\. Go elsewhere")
    with aside, writing(tmp_path / "out", "Go elsewhere"):
        (tmp_path / ".out.tmp" / "x").write_text("")
    missing = pytest.raises(UserError, match=r"directory: .*tokenizer\.model\. Go elsewhere")
    with missing, writing(tmp_path / "out", "Go elsewhere"):
        (tmp_path / "tokenizer.model").read_text()


def test_what_is_no_run_is_told(command, file, tmp_path):
    def refusal(path):
        code, said = command("export", path, "--output", tmp_path / "out")
        assert code == 2
        assert "name the run's folder, runs/<name>" in said
        return said

    run = tmp_path / "run"
    checkpoint = run / "checkpoints" / "step_000000002"
    checkpoint.mkdir(parents=True)
    assert f"there is no {tmp_path / 'nothing'}" in refusal(tmp_path / "nothing")
    assert f"{file} is a file" in refusal(file)
    assert "is not a run" in refusal(checkpoint)
    assert "/ is not a run" in refusal("/")
    (run / "config.toml").touch()
    assert f"is part of the run in {run} (--step selects a checkpoint)" in refusal(checkpoint)


def test_a_file_that_is_no_dataset_is_told(command, file):
    code, said = command("check-dataset", file)
    assert code == 2
    assert f"{file} is a file, but neither a dataset's folder nor a run's TOML file" in said


def test_statistics_that_are_shown_are_not_those_of_a_setting(command):
    for arguments in (["--show", "nope.json"], ["--diff", "nope.json", "nope.json"]):
        code, said = command("norm-stats", *arguments)
        assert code == 2
        assert "nope.json cannot be read: No such file or directory. Name a norm_stats.json" in said
