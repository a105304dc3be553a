"""`rlinf norm-stats`: compute, show, compare, import."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from distributions import repository_plugins
from safetensors.numpy import save_file

from rlinf_core import cli
from rlinf_core.data.normalize import NormStats, Origin, load_norm_stats, load_with_origin, save_norm_stats

ROOT = Path(__file__).parents[2]
QUICKSTART = "examples/quickstart.toml"
LEROBOT = "examples/data/metaworld_3tasks/meta/stats.json"


@pytest.fixture
def command(monkeypatch, capsys):
    """Run the command; returns (exit code, stdout, stderr)."""
    monkeypatch.setattr("rlinf_core.plugins.registry.get_plugins", repository_plugins)
    return lambda *arguments: (cli.main(["norm-stats", *map(str, arguments)]), *capsys.readouterr())


def stats_of(width, **fields):
    zeros = {name: np.zeros(width) for name in ("mean", "q01")} | {name: np.ones(width) for name in ("std", "q99")}
    return NormStats(**(zeros | fields))


def test_what_a_run_would_use_is_computed_without_torch(tmp_path):
    code = "import sys; from rlinf_core.cli import main; code = main(sys.argv[1:]); assert 'torch' not in sys.modules"
    command = [sys.executable, "-c", f"{code}; sys.exit(code)", "norm-stats", QUICKSTART, f"--output={tmp_path}/s.json"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    head, *rows = result.stdout.splitlines()
    assert head.split()[:7] == ["mean", "std", "q01", "q99", "min", "max", "share"]
    names = {"state": ("x", "y", "z", "gripper_opening"), "actions": ("dx", "dy", "dz", "gripper_effort")}
    expected = [f"{key}[{i}: {name}]" for key in names for i, name in enumerate(names[key])]
    assert [row.partition("]")[0] + "]" for row in rows[:8]] == expected
    stats, origin = load_with_origin(tmp_path / "s.json")
    assert (len(stats["actions"].mean), origin.rows, origin.episodes, origin.horizon) == (4, 1607, 92, 5)


def test_findings_and_numbers_as_json(command, tmp_path):
    _, out, _ = command(QUICKSTART, "--json", "data.norm_floor=0.2", "--output", tmp_path / "s.json")
    found = json.loads(out)
    assert (found["normalization"], found["findings"], found["made_of"]["norm_floor"]) == ("quantile", [], 0.2)
    state = found["statistics"]["state"]
    assert min(high - low for low, high in zip(state["q01"], state["q99"], strict=True)) == pytest.approx(0.4)
    assert state["max"][3] == 1.0
    assert max(state["largest_normalized"]) < 2
    path = tmp_path / "s.json"
    path.write_text(path.read_text().replace('"q01"', '"other"'))
    code, out, _ = command(QUICKSTART, f"data.norm_stats={path}", "--json")
    assert code == 2
    assert {one["id"] for one in json.loads(out)["findings"]} == {"no-quantiles"}


def test_statistics_that_would_spoil_a_run_are_not_written(command, tmp_path):
    save_norm_stats(tmp_path / "s.json", {"state": stats_of(4), "actions": stats_of(3)})
    code, out, _ = command(QUICKSTART, f"data.norm_stats={tmp_path}/s.json", "--output", tmp_path / "new.json")
    assert code == 2
    assert "error: too-narrow: actions: " in out
    assert not (tmp_path / "new.json").exists()


def test_a_file_is_shown(command, tmp_path):
    save_norm_stats(tmp_path / "s.json", {"state": stats_of(2)}, Origin(dataset="me/data", rows=9))
    code, out, _ = command("--show", tmp_path / "s.json")
    assert code == 0
    assert [line.split() for line in out.splitlines()[1:]] == [
        ["state[0]", "0", "1", "0", "1"],
        ["state[1]", "0", "1", "0", "1"],
        ["dataset:", "me/data"],
        ["rows:", "9"],
    ]
    assert json.loads(command("--show", tmp_path / "s.json", "--json")[1])["made_of"] == {
        "dataset": "me/data",
        "rows": 9,
    }


def test_two_files_are_compared_in_units_of_spread(command, tmp_path):
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    save_norm_stats(a, {"state": stats_of(3)})
    save_norm_stats(b, {"state": stats_of(4, mean=np.array([0, 0.5, 0, 0]), q99=np.array([1, 1, -2.0, 1]))})
    found = json.loads(command("--diff", a, b, "--json")[1])
    assert [(one["dimension"], one["statistic"], round(one["spreads"], 3)) for one in found] == [
        (2, "q99", -3.0),
        (1, "mean", 0.5),
    ]
    out = command("--diff", a, b)[1]
    assert "state: A has 3 dimensions, B 4; only those of both are compared" in out
    assert command("--diff", a, a)[1].endswith("no difference\n")


def test_openpis_files_are_imported_with_their_root_or_without(command, tmp_path):
    table = {"mean": [1.0], "std": [2.0], "q01": None, "q99": None}
    for i, content in enumerate(({"norm_stats": {"state": table}}, {"state": table, "other": {}})):
        (tmp_path / "theirs.json").write_text(json.dumps(content))
        code, out, _ = command(
            "--import", tmp_path / "theirs.json", "--from=openpi", "--output", tmp_path / f"{i}.json"
        )
        assert code == 0
        assert "has no quantiles" in out
        assert load_norm_stats(tmp_path / f"{i}.json")["state"].std.tolist() == [2.0]


def test_lerobots_statistics_are_imported_by_their_columns(command, tmp_path):
    output = tmp_path / "s.json"
    code, out, _ = command("--import", LEROBOT, "--from", "lerobot", "--output", output)
    assert code == 0
    assert "means of the episodes' quantiles" in out
    theirs = json.loads((ROOT / LEROBOT).read_text())
    assert load_norm_stats(output)["actions"].q99.tolist() == theirs["action"]["q99"]
    code, _, error = command(QUICKSTART, "data.actions=['acton']", "--import", LEROBOT, "--from=lerobot", "--output=x")
    assert code == 2
    assert "has no statistics of 'acton'; did you mean 'action'?" in error
    changed = {name: values for name, values in theirs["action"].items() if not name.startswith("q")}
    (tmp_path / "old.json").write_text(json.dumps(theirs | {"action": changed}))
    assert "no quantiles" in command("--import", tmp_path / "old.json", "--from=lerobot", "--output", output)[1]


def test_a_lerobot_policys_normalizer_is_imported(command, tmp_path):
    tensors = {
        f"{column}.{name}": np.arange(3.0) for column in ("observation.state", "action") for name in ("mean", "std")
    }
    save_file(tensors, tmp_path / "policy_preprocessor_step_5_normalizer_processor.safetensors")
    path = next(tmp_path.glob("*.safetensors"))
    assert command("--import", path, "--from=lerobot", "--output", tmp_path / "s.json")[0] == 0
    assert load_norm_stats(tmp_path / "s.json")["state"].std.tolist() == [0.0, 1.0, 2.0]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "give a config, or one of --show"),
        (["--import", "x.json"], "--import FILE and --from openpi|lerobot go together"),
        (["--import", "x.json", "--from=openpi"], "--import needs --output FILE"),
        (["--import", "no.json", "--from=openpi", "--output=y"], "no.json cannot be read"),
        (["--show", "no.json"], "no.json cannot be read"),
        (["--import", LEROBOT, "--from=openpi", "--output=y"], "not a norm_stats.json of openpi: it has 'action'"),
        (["--diff", "no.json", "no.json"], "no.json cannot be read"),
    ],
)
def test_what_cannot_be_done_is_said(command, arguments, text):
    code, _, error = command(*arguments)
    assert code == 2
    assert text in error
