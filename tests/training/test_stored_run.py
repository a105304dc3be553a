"""A run of an earlier version continues: `stored_run/` was written by version 0.1.0 as of 2026-11-23.

It holds a run of the toy policy after 6 steps, and what the same version measured when it went on to 12. Where both
versions ran on one machine, every number was equal to the bit; elsewhere a CPU may round differently.
"""

import json
import shutil
from pathlib import Path

import pytest

from rlinf_core import UserError
from rlinf_core.export import Choice, export_run

STORED = Path(__file__).parent / "stored_run"
SETTINGS = ("optim.ema_decay=0.9", "runner.save_interval=6", "runner.val_check_interval=6", "runner.max_steps=12")


def test_a_run_of_an_earlier_version_goes_on_as_it_would_have(tmp_path, train_toy):
    folder = tmp_path / "stored"
    shutil.copytree(STORED / "run", folder)
    before = (folder / "metrics.jsonl").read_text()
    trainer = train_toy("runner.name=stored", *SETTINGS)
    assert trainer.step == 12
    after = (folder / "metrics.jsonl").read_text()
    assert after.startswith(before)
    measured = {}
    for line in after.removeprefix(before).splitlines():
        record = json.loads(line)
        measured.setdefault(str(record["step"]), {}).update(record)
    continued = json.loads((STORED / "continued.json").read_text())
    assert measured.keys() == continued.keys()
    for step, expected in continued.items():
        assert {key: measured[step][key] for key in expected} == pytest.approx(expected, rel=1e-5), step


def change(path, value):
    table = json.loads(path.read_text())
    table["norm_stats"]["state"]["std"][0] = value
    path.write_text(json.dumps(table))


def test_its_statistics_must_be_numbers(tmp_path, train_toy):
    """Checkpoints of that version have no copy of the statistics."""
    shutil.copytree(STORED / "run", tmp_path / "stored")
    change(tmp_path / "stored" / "norm_stats.json", float("nan"))
    with pytest.raises(UserError, match=r"norm_stats.json contains NaN or infinity: state\.std\. .*from a backup"):
        train_toy("runner.name=stored", *SETTINGS)


def test_the_statistics_are_part_of_a_checkpoint(tmp_path, train_toy, toy_plugins):
    train_toy("runner.name=run", "runner.max_steps=2")
    folder = tmp_path / "run"
    path, copy = folder / "norm_stats.json", folder / "checkpoints" / "step_000000002" / "norm_stats.json"
    whole = path.read_text()
    assert copy.read_text() == whole
    for damage, complaint in (
        (lambda: change(path, 1000.0), r"has changed since .*: state\.std\[0\] was .*, now 1000\. "),
        (lambda: change(path, float("nan")), r"state\.std\[0\] was .*, now nan\. "),
        (lambda: path.write_text(whole[:100]), "is not a norm_stats.json .*"),
    ):
        path.write_text(whole)
        damage()
        refused = rf"(?s){complaint}.*: copy {copy} to {path}"
        with pytest.raises(UserError, match=refused):
            train_toy("runner.name=run", "runner.max_steps=4")
        with pytest.raises(UserError, match=refused):
            export_run(folder, tmp_path / "exported", Choice(), toy_plugins)
    path.write_text(json.dumps(json.loads(whole)))  # The same numbers in another layout.
    assert train_toy("runner.name=run", "runner.max_steps=3").step == 3
    path.unlink()
    assert train_toy("runner.name=run", "runner.max_steps=4").step == 4
    assert path.read_text() == json.dumps(json.loads(whole))
    change(folder / "checkpoints" / "step_000000004" / "norm_stats.json", 1000.0)
    with pytest.raises(UserError, match=r"step_000000004 is damaged|norm_stats.json has .* bytes"):
        export_run(folder, tmp_path / "exported", Choice(step=4), toy_plugins)
