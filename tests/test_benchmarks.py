"""Every command in `benchmarks/`, at a size that is quick: the shape of what it prints, not how fast anything is."""

import datetime
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from reporting.result_line import ResultLine
from text_sft.profile import ATTENTION, HEAD, LAYERS, Profile

ROOT = Path(__file__).parents[1]
COMMANDS = {
    "adapters": ("--rounds=1", "--steps=1"),
    "checkpoint": ("--rounds=1", "--width=16"),
    "data_loading": ("--cases=image_h10", "--rounds=1", "--seconds=0.1", "--frames=12"),
    "evaluation_cost": ("--rounds=1", "--seconds-a-step=0"),
    "gpu_probe": ("--tiny", "--device=cpu"),
    "infer": ("--size=minimal", "--rounds=1", "--requests=3"),
    "large_table": ("--rows=6000",),
    "norm_stats": ("--frames=32",),
    "real_time_chunking": ("--steps=2", "--demonstrations=8", "--episodes=1", "--delays=2"),
    "report_page": ("--steps=600", "--rounds=1"),
    "rollouts": ("--rounds=1", "--episodes=1", "--horizon=16", "--image-size=32"),
    "scaling": ("--ranks=2", "--steps=1"),
    "text_step": ("--rounds=1", "--steps=1", "--batch=2", "--vocabulary=512", "--sides=transformers"),
    "tracker_cost": ("--trackers=tensorboard", "--steps=3"),
    "training_step": ("--size=minimal", "--batch=1", "--rounds=1", "--without-peers"),
}
EXPECTED = {
    "adapters": {"step_vs_peft", "step_vs_full", "plan_gb_pi05_24"},
    "checkpoint": {"stall_vs_rank0_save", "sync_stall_vs_rank0_save"},
    "data_loading": {"image_h10"},
    "evaluation_cost": {"training_seconds", "other_seconds", "apart_seconds"},
    "gpu_probe": {"failed", "vision default forward_ms", "step, micro batch 2, not compiled samples_per_second"},
    "infer": {"infer_vs_lerobot", "pi0", "pi05", "server_overhead_ms", "server_processor_ms"},
    "large_table": {"cold_seconds", "warm_seconds", "pss_of_6_processes_gb"},
    "norm_stats": {"vs_openpi_loader", "frames_per_second"},
    "real_time_chunking": {"success guided at 2", "jerk trained at 2", "success switch at 2"},
    "report_page": {"page_mb", "elements"},
    "rollouts": {"steps_per_second_1", "steps_per_second_2", "two_over_one", "serial_share"},
    "scaling": {"bytes_over_formula", "same_order", "loss_difference", "step_seconds_1", "step_seconds_2"},
    "text_step": {"tokens_per_second_vs_transformers", "packed_vs_transformers_packed"},
    "tracker_cost": {"tensorboard_share", "tensorboard_process_share"},
    "training_step": {"flops_over_useful"},
}
NEEDED = {
    "adapters": "peft",
    "text_step": "accelerate",
    "infer": "lerobot",
    "rollouts": "metaworld",
    "norm_stats": "lerobot",
    "data_loading": "lerobot",
}


def run(name, arguments, folder):
    command = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def result_of(stdout, name):
    """The object that the last line is, after seeing that it has the shape."""
    assert stdout.endswith("\n")
    found = json.loads(stdout.splitlines()[-1], parse_constant=lambda text: pytest.fail(f"{text} is not JSON"))
    assert found["benchmark"] == name
    datetime.date.fromisoformat(found["date"])
    assert found["machine"].keys() >= {"processor", "cores", "memory_gb", "load"}
    assert found["results"]
    for key, value in found["results"].items():
        assert isinstance(value, int | float), key
        assert math.isfinite(value), key
    return found


def test_every_file_is_a_command_that_is_tested():
    assert {path.stem for path in (ROOT / "benchmarks").glob("*.py")} == COMMANDS.keys()


def test_every_command_prints_through_the_same_line():
    for path in (ROOT / "benchmarks").glob("*.py"):
        source = path.read_text(encoding="utf-8")
        assert "from reporting.result_line import ResultLine" in source, path
        assert "line.write(" in source, path


@pytest.mark.timeout(900)  # Several processes each, which a busy machine starts slowly.
@pytest.mark.slow  # Up to a minute each, also at their smallest.
@pytest.mark.parametrize("name", COMMANDS)
def test_json_is_one_line_and_the_last(name, tmp_path):
    if name in NEEDED:
        pytest.importorskip(NEEDED[name], reason="the peer needs it: uv sync --all-groups")
    stdout = run(name, ("--json", *COMMANDS[name]), tmp_path)
    assert len(stdout.splitlines()) == 1  # What libraries print goes to standard error.
    assert result_of(stdout, name)["results"].keys() >= EXPECTED[name]


@pytest.mark.slow
def test_the_table_of_a_gpu_has_the_same_line_and_still_writes_its_files(tmp_path):
    arguments = ("--json", "--table", "--device=cpu", "--size=minimal", "--samples=1", "--micro-batch=1", "--steps=1")
    stdout = run("training_step", (*arguments, "--eager", "--rows=MetaWorld", "--output=found"), tmp_path)
    assert result_of(stdout, "training_step")["results"].keys() == {"ours, π0.5, MetaWorld-like"}
    assert {path.name for path in (tmp_path / "found").iterdir()} == {"training_step.json", "training_step.md"}


def test_a_profile_counts_products_and_tells_the_head_from_layers():
    profile = Profile(width=8, vocabulary=40)
    hidden, weight, square = torch.ones(5, 8), torch.ones(40, 8), torch.ones(8, 8)
    query = torch.ones(1, 2, 6, 8)
    profile.start()
    logits = torch.empty(5, 40)
    torch.mm(hidden, weight.t(), out=logits)
    logits.exp().sum(-1)
    torch.zeros(5, 8).addmm_(logits, weight)
    torch.nn.functional.linear(hidden, square)
    torch.nn.functional.scaled_dot_product_attention(query, query, query)
    profile.stop(steps=1)
    assert profile.found["logit_rows_per_step"] == 5
    products = 2 * 5 * 8 * 40 * 2 + 2 * 5 * 8 * 8 + 4 * query.numel() * 6
    assert profile.found["gflops_per_step"] == pytest.approx(products / 1e9)
    assert profile.found["shares"].keys() >= {HEAD, LAYERS, ATTENTION}
    assert sum(profile.found["shares"].values()) == pytest.approx(1, abs=0.01)


def test_nothing_follows_the_line(tmp_path):
    """Exit handlers, C code and child processes print, too."""
    program = (
        "import atexit, os, subprocess, sys\n"
        "from reporting.result_line import ResultLine\n"
        "line = ResultLine('one', wanted=True)\n"
        "atexit.register(print, 'late')\n"
        "os.write(1, b'C code\\n')\n"
        "print('a library')\n"
        "subprocess.run(['echo', 'a child'])\n"
        "line.write({'ratio': 2}, 'text', rounds=[1, 3])\n"
        "print('after')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT / "benchmarks", capture_output=True, text=True, check=True
    )
    assert result_of(done.stdout, "one")["rounds"] == [1, 3]
    assert len(done.stdout.splitlines()) == 1
    assert all(text in done.stderr for text in ("late", "C code", "a library", "a child", "after"))


def test_without_json_people_get_text(capsys):
    ResultLine("one", wanted=False).write({"ratio": 2}, "twice as fast")
    assert capsys.readouterr().out == "twice as fast\n"


@pytest.mark.parametrize("value", [math.nan, math.inf, None, True, "2"])
def test_results_are_finite_numbers(value):
    program = f"line.write({{'ratio': {value!r}}}, '')".replace("nan", "float('nan')").replace("inf", "float('inf')")
    program = f"from reporting.result_line import ResultLine\nline = ResultLine('one', wanted=True)\n{program}"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT / "benchmarks", capture_output=True, text=True, check=False
    )
    assert done.stdout == ""
    assert "ratio is" in done.stderr
    assert "not a finite number" in done.stderr
