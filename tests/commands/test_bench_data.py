"""`rlinf bench-data`: what is measured of a run's loader, and what is said of it."""

import json
import multiprocessing
import subprocess
import sys

import pytest

from rlinf_core.cli import main
from rlinf_core.commands import bench_data

FEW = ("examples/quickstart.toml", "data.episodes=['0-5']", "data.validation_fraction=0", "runner.val_check_interval=0")


@pytest.mark.parametrize("settings", [[], ["data.shuffle=chunked"]], ids=["random", "chunked"])
def test_the_report_of_a_run(settings, capsys):
    given = ["--ranks", "2", "--seconds", "0.3", "--samples-per-second-per-gpu", "5", "--json"]
    assert main(["bench-data", *FEW, "data.num_workers=0", *settings, *given]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["ranks"], told["workers"], told["micro_batch_size"]) == (2, 0, 16)
    assert told["samples"] >= 32
    assert told["gpus_fed"] == pytest.approx(told["samples_per_second"] / 5)
    assert not told["assumed"]
    assert told["decoder"] in ("pyav", "torchcodec")
    assert told["first_batch_s"] > 0
    assert told["worker_mb"] is None
    shares = told["shares"]
    assert shares["read"] + shares["transform"] + shares["collate"] == pytest.approx(1)
    assert shares["pictures"] > 0.5 * shares["read"]  # 480 x 480 video
    assert (told["most_held_mb"] > 100) == bool(settings)  # 9152 samples with an image of 0.15 MB: 1.4 GB


def test_workers_are_measured_and_ended(capsys):
    before = set(multiprocessing.active_children())
    assert (
        main(["bench-data", *FEW, "data.num_workers=1", "--seconds", "0.2", "--samples-per-second-per-gpu", "5"]) == 0
    )
    told = capsys.readouterr().out
    assert "(1 rank, 1 worker each, micro batch 16)" in told
    assert "MB private memory in the largest worker" in told
    assert "GPUs at 5 samples/s each (given)" in told
    assert set(multiprocessing.active_children()) <= before


def test_what_a_gpu_takes_is_predicted_where_it_is_not_given(monkeypatch, capsys):
    monkeypatch.setattr(bench_data, "_predicted", lambda config, plugins, ranks: 60.0)
    assert main(["bench-data", *FEW, "data.num_workers=0", "--seconds", "0.1"]) == 0
    assert (
        "GPUs at 60 samples/s each (predicted for an H100 at 40% MFU; override it with --samples"
        in capsys.readouterr().out
    )


def test_of_a_run_on_the_cpu_no_gpus_are_told(capsys):
    told = {
        form: (main(["bench-data", *FEW, "data.num_workers=0", "--seconds", "0.1", *form]), capsys.readouterr().out)[1]
        for form in ((), ("--json",))
    }
    assert 'unknown: trainer.device is "cpu"; give --samples-per-second-per-gpu' in told[()]
    assert json.loads(told["--json",])["gpus_fed"] is None


def test_a_text_run_has_no_pictures(capsys):
    text = ["examples/text_sft.toml", "data.num_workers=0", "--seconds", "0.1", "--samples-per-second-per-gpu", "5"]
    assert main(["bench-data", *text]) == 0
    told = capsys.readouterr().out
    assert "none: no images" in told
    assert "pictures 0%" not in told


def test_a_missing_config_is_told_before_torch_is_loaded():
    code = "import sys; from rlinf_core.cli import main; code = main(sys.argv[1:]); assert 'torch' not in sys.modules"
    for command in ("bench-data", "plan"):
        done = subprocess.run([sys.executable, "-c", code, command, "none.toml"], capture_output=True, text=True)
        assert not done.returncode, done.stderr
        assert "none.toml" in done.stderr


@pytest.mark.parametrize("option", ["--ranks", "--seconds", "--samples-per-second-per-gpu"])
def test_numbers_that_make_no_sense_are_refused(option, capsys):
    assert main(["bench-data", *FEW, option, "0"]) == 2
    assert f"{option} must be greater than 0" in capsys.readouterr().err


def test_sizes_that_do_not_divide_are_told(capsys):
    assert main(["bench-data", *FEW, "--ranks", "3"]) == 2
    assert "not a multiple of 3 ranks" in capsys.readouterr().err
