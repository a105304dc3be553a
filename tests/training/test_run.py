"""A run as users start it: the same on one, two and three ranks, and the same after a kill as without one.

Every run is the dummy π0.5 in float32 on the embedded dataset. A plugin, installed beside the others, writes down the
weights at the start and at the end, and can kill the process in the middle.
"""

import json
import signal
from pathlib import Path

import distributions
import pytest
import torch
from safetensors.torch import load_file

from rlinf_plugins_openpi.model.dimensions import Pi0Dimensions
from rlinf_plugins_openpi.model.parts import unpacked

DIMENSIONS = Pi0Dimensions.of("dummy", pi05=True, action_dim=32, action_horizon=1)
"""Settings of all runs here that decide which published tensors a parameter holds."""
ROOT = Path(__file__).parents[2]
OBSERVER = """
import os, signal
from pathlib import Path
from rlinf_core import hookimpl

def save(trainer, name):
    from safetensors.torch import save_file
    whole = {key: p.detach().full_tensor() for key, p in trainer.policy.named_parameters()}
    if int(os.environ.get("RANK", "0")) == 0:
        save_file(whole, Path(os.environ["OBSERVED"]) / f"{name}.safetensors")

@hookimpl
def rlinf_train_started(trainer):
    save(trainer, f"start_{trainer.step}")

@hookimpl
def rlinf_step_finished(trainer, step):
    if step == int(os.environ.get("KILL_AFTER", "0")):
        os.kill(os.getpid(), signal.SIGKILL)

@hookimpl
def rlinf_train_finished(trainer, error):
    if error is None:
        save(trainer, "end")
"""
SETTINGS = [
    "policy.action_dim=8",
    "policy.augment=true",  # a sample's images are changed alike on any number of ranks
    "runner.val_check_interval=0",
    "data.validation_fraction=0.8",  # a run begins with a look at all rows for training
    "data.num_workers=0",
    "trainer.global_batch_size=12",
    "trainer.micro_batch_size=2",
    "optim.warmup_steps=0",
    "trainer.min_unit_size=0",  # every unit of the small model is sharded apart, as a large one's are
]


@pytest.fixture(scope="module")
def launch(tmp_path_factory, start_ranks):
    site = tmp_path_factory.mktemp("site")
    distributions.install(site, "observer", plugins={"observer": "observer"}, observer=OBSERVER)

    def launch(ranks, folder, *overrides, kill_after=0):
        (folder / "run").mkdir(parents=True, exist_ok=True)
        observed = {"OBSERVED": str(folder / "run"), "KILL_AFTER": str(kill_after)}
        arguments = ["examples/quickstart.toml", f"runner.output_dir={folder / 'runs'}", "runner.name=run"]
        main = "rlinf_core.train:main"
        return start_ranks(main, ranks, *arguments, *SETTINGS, *overrides, paths=[site], **observed)

    return launch


def rows(folder):
    return [json.loads(line) for line in (folder / "runs" / "run" / "metrics.jsonl").read_text().splitlines()]


def losses(folder):
    return torch.tensor([row["loss"] for row in rows(folder)], dtype=torch.float64)


@pytest.fixture(scope="module")
def by_ranks(launch, tmp_path_factory):
    """The same four steps on 1, 2 and 3 ranks."""
    folders = {}
    for ranks in (1, 2, 3):
        folders[ranks] = tmp_path_factory.mktemp(f"ranks{ranks}")
        result = launch(ranks, folders[ranks], "runner.max_steps=4")
        assert result.returncode == 0, result.stdout + result.stderr
        (folders[ranks] / "stdout").write_text(result.stdout)
    return folders


def weights(folder, when):
    return load_file(folder / "run" / f"{when}.safetensors")


@pytest.mark.parametrize("ranks", [2, 3])
def test_initial_weights_are_bit_equal_on_any_number_of_ranks(by_ranks, ranks):
    one, many = weights(by_ranks[1], "start_0"), weights(by_ranks[ranks], "start_0")
    assert one.keys() == many.keys()
    assert [name for name in one if not torch.equal(one[name], many[name])] == []
    assert all(tensor.isfinite().all() for tensor in one.values())


@pytest.mark.parametrize("ranks", [2, 3])
def test_losses_and_weights_are_equal_to_rounding_on_any_number_of_ranks(by_ranks, ranks):
    one, many = losses(by_ranks[1]), losses(by_ranks[ranks])
    assert len(one) == 4
    torch.testing.assert_close(many, one, rtol=1e-4, atol=0)
    start, end, other = (weights(by_ranks[r], when) for r, when in ((1, "start_0"), (1, "end"), (ranks, "end")))
    # The true gradient of these is zero: Adam turns its rounding noise into movement (docs/numerics.md).
    start, end, other = (unpacked(state, DIMENSIONS) for state in (start, end, other))
    names = [name for name in start if not (name.startswith("vision.") and name.endswith("k_proj.bias"))]
    off = sum(float((other[name] - end[name]).square().sum()) for name in names) ** 0.5
    update = sum(float((end[name] - start[name]).square().sum()) for name in names) ** 0.5
    assert update > 0
    assert off / update <= 5e-3


def test_a_run_writes_what_others_read(by_ranks):
    folder = by_ranks[2] / "runs" / "run"
    assert [row["step"] for row in rows(by_ranks[2])] == [1, 2, 3, 4]
    assert rows(by_ranks[2])[0].keys() >= {"step", "loss", "lr", "grad_norm", "samples_per_second", "data_wait_share"}
    assert json.loads((folder / "environment.json").read_text())["ranks"] == 2
    assert json.loads((folder / "norm_stats.json").read_text())["norm_stats"].keys() == {"state", "actions"}
    assert (folder / "latest").read_text() == "step_000000004"
    state = json.loads((folder / "checkpoints" / "step_000000004" / "state.json").read_text())
    assert (state["step"], state["sample"]) == (4, 48)


def test_a_run_says_once_what_takes_a_while(by_ranks):
    """On three ranks; before the logger's first line, which names the run."""
    before = (by_ranks[3] / "stdout").read_text().partition("run starts: ")[0]
    assert [line for line in before.splitlines() if line.endswith(" ...")] == [
        "loading plugins and the config ...",
        "loading torch and joining the ranks ...",
        "opening the data ...",
        "statistics of 382 training rows ...",
        "building the policy with its initial values ...",
    ]


@pytest.mark.slow  # tests/faults does it to a toy policy many times.
def test_a_killed_run_goes_on_as_if_nothing_had_happened(by_ranks, launch, tmp_path):
    settings = ["runner.max_steps=4", "runner.save_interval=2"]
    killed = launch(2, tmp_path, *settings, kill_after=3)
    assert killed.returncode == -signal.SIGKILL
    assert (tmp_path / "runs" / "run" / "latest").read_text() == "step_000000002"
    again = launch(2, tmp_path, *settings)
    assert again.returncode == 0, again.stderr
    assert "continues at step 2" in again.stdout
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4]
    assert torch.equal(losses(tmp_path), losses(by_ranks[2]))
    one, other = weights(by_ranks[2], "end"), weights(tmp_path, "end")
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_a_mistake_is_said_once_and_names_the_way_out(start_ranks, tmp_path):
    # However slow this machine is: rank 1 waits with its message until rank 0 has ended, and it is ended, too.
    patient = "import rlinf_core.process.ending\n\nrlinf_core.process.ending.OTHER_RANKS_WAIT = 120.0\n"
    distributions.install(tmp_path / "site", "patient", plugins={"patient": "patient"}, patient=patient)
    settings = ["examples/quickstart.toml", f"runner.output_dir={tmp_path}", *SETTINGS, "trainer.global_batch_size=7"]
    result = start_ranks("rlinf_core.train:main", 2, *settings, paths=[tmp_path / "site"])
    assert result.returncode == 2
    said = [line for line in result.stderr.splitlines() if "global_batch_size = 7" in line]
    assert len(said) == 1
    assert "set global_batch_size to 4 or 8" in said[0]
    assert "Traceback" not in result.stderr
