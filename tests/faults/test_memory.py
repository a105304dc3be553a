"""A long run's host memory is flat. pytest tests/faults/test_memory.py -m slow (three minutes)"""

import json

import pytest
from distributions import install
from toy_policy import CONFIG

ALLOWED = 2 * 2**20
"""Bytes that a process may grow by in 4,000 steps."""


@pytest.mark.slow  # tests/training/state/test_optim.py counts what a bare optimizer leaves behind.
def test_no_process_grows_with_the_steps(start_ranks, tmp_path):
    install(tmp_path, "toy", plugins={"toy": "toy_policy"}, datasets={"toy": "toy_policy:TrainableToyDataset"})
    install(tmp_path, "memory", plugins={"memory": "memory_plugin"})
    (tmp_path / "toy.toml").write_text(CONFIG)
    ended = start_ranks(
        "rlinf_core.train:main",
        2,
        *(tmp_path / "toy.toml", f"runner.output_dir={tmp_path}", "runner.name=long", "runner.max_steps=5000"),
        *("runner.save_interval=1000", "runner.val_check_interval=250", "data.num_workers=1", "optim.ema_decay=0.9"),
        paths=[tmp_path],
        RLINF_DISABLE_PLUGINS="rlinf-plugins-text",
    )
    assert ended.returncode == 0, ended.stderr
    for rank in range(2):
        rows = [json.loads(line) for line in (tmp_path / "long" / f"memory_{rank}.jsonl").read_text().splitlines()]
        first, *_, last = rows
        assert (first["step"], last["step"]) == (1_000, 5_000)
        assert last["rank"] - first["rank"] < ALLOWED, rows
        assert len(first["workers"]) == len(last["workers"]) > 0
        grown = [end - start for start, end in zip(first["workers"], last["workers"], strict=True)]
        assert max(grown) < ALLOWED, rows
