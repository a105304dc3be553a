"""`policy.rtc_training_max_delay` through a run: resumed, exported, loaded, and what other formats say of it."""

import numpy as np
import pytest
from safetensors.numpy import load_file

from rlinf_core import Continuation, UserError, load_policy
from rlinf_core.config.load import load_config
from rlinf_core.export import Choice, _left_out, export_run
from rlinf_core.plugins.registry import get_plugins
from rlinf_core.training.distributed.processes import processes
from rlinf_core.training.run_folder import prepare_folder

SETTINGS = [
    *("runner.val_check_interval=0", "runner.save_interval=1", "data.num_workers=0", "data.validation_fraction=0"),
    *("trainer.global_batch_size=3", "trainer.micro_batch_size=3"),
    *("optim.decay_steps=30", "policy.rtc_training_max_delay=4", "policy.num_sampling_steps=2"),
]


def trained(folder, steps, *more):
    settings = [f"runner.output_dir={folder}", f"runner.max_steps={steps}", *SETTINGS, *more]
    run = load_config("examples/quickstart.toml", settings)
    with pytest.MonkeyPatch.context() as patch, processes("cpu") as group:
        patch.delenv("RANK", raising=False)
        start = prepare_folder(run, overwrite=False)
        run.trainer.build(run, start=start, group=group, plugins=get_plugins()).train()
    return run.folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("runs"), 2)


def test_an_exported_folder_knows_what_it_was_trained_for(folder, tmp_path):
    export_run(folder, tmp_path / "policy", Choice(), get_plugins())
    policy = load_policy(tmp_path / "policy")
    horizon = policy.config.action_horizon
    assert policy.config.continuation_ways() == {"guided": horizon, "trained": 4}
    row = {
        "observation.image": np.zeros((224, 224, 3), np.uint8),
        "observation.state": np.zeros(4, np.float32),
        "task": "Reach a goal position",
    }
    left = np.random.default_rng(0).uniform(-0.5, 0.5, (horizon - 2, 4)).astype(np.float32)
    chunk = policy.infer(row, continuing=Continuation(left, 3))
    np.testing.assert_allclose(chunk[:3], left[:3], atol=1e-4)
    assert np.isfinite(chunk).all()


@pytest.mark.slow  # Ten seconds: three runs.
def test_a_run_that_continues_is_the_same_to_the_bit(folder, tmp_path):
    """Delays belong to the samples: stopped after the first step, the second has those of the run that was not."""
    again = trained(tmp_path / "runs", 1)
    assert trained(tmp_path / "runs", 2) == again
    both = []
    for number, run in enumerate((folder, again)):
        export_run(run, tmp_path / str(number), Choice(), get_plugins())
        both.append(load_file(tmp_path / str(number) / "model.safetensors"))
    assert both[0].keys() == both[1].keys()
    assert all(np.array_equal(both[0][name], both[1][name]) for name in both[0])


def test_a_run_without_it_does_not_become_one_with_it(folder, tmp_path):
    with pytest.raises(UserError, match=r"policy\.rtc_training_max_delay"):
        trained(folder.parent, 2, "policy.rtc_training_max_delay=2")


def test_other_formats_say_that_they_do_not_have_it(folder):
    run = load_config(folder / "config.toml")
    for format in ("openpi", "lerobot"):
        [note] = _left_out(run, Choice(format=format))
        assert "was trained for real-time chunking, which the format" in note
    assert not [*_left_out(run, Choice())]
    usual = load_config("examples/quickstart.toml")
    assert not [*_left_out(usual, Choice(format="openpi"))]
