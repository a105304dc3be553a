"""A run of an earlier version continues: `stored_run/` was written by version 0.1.0 as of 2026-11-23.

It holds a run of the toy policy after 6 steps, and what the same version measured when it went on to 12. Where both
versions ran on one machine, every number was equal to the bit; elsewhere a CPU may round differently.
"""

import json
import shutil
from pathlib import Path

import pytest

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
