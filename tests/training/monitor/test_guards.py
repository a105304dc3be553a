"""Steps with NaN or infinity are skipped, loss spikes are flagged, and both name their samples."""

import json
import math
import os
import signal
from types import SimpleNamespace

import distributions
import pytest
import torch
import toy_policy

from rlinf_core.errors import UserError
from rlinf_core.loggers.jsonl import read_rows
from rlinf_core.training.monitor import monitor
from rlinf_core.training.monitor.anomalies import (
    FEWEST,
    WINDOW,
    Guard,
    History,
    Spikes,
    have_diverged,
    last_checkpoint,
    read_history,
    suspects,
)

FORWARD = toy_policy.ToyModule.forward
RUNNER = SimpleNamespace(spike_threshold=10.0, max_skipped_steps=3)


BREAKS_ON_RANK_1 = """
import os
from rlinf_core import hookimpl

@hookimpl
def rlinf_policy_built(policy):
    if os.environ["RANK"] == "1":
        policy.register_forward_hook(broken)

def broken(policy, _, out):
    policy.steps = getattr(policy, "steps", 0) + 1
    if policy.steps < 2:
        return out
    each = out.sample_losses.clone()
    each[7, 0] = float("inf")
    return out._replace(loss_sum=out.loss_sum + float("inf"), sample_losses=each)
"""


@pytest.fixture
def train(train_toy):
    return train_toy


def break_samples(monkeypatch, steps, change):
    """Change the toy's output in micro batches of some steps, of which each has two."""
    calls = []

    def broken(self, batch):
        out = FORWARD(self, batch)
        if not self.training:
            return out
        calls.append(batch["index"].tolist())
        return change(out, len(calls) - 1) if (len(calls) - 1) // 2 in steps else out

    monkeypatch.setattr(toy_policy.ToyModule, "forward", broken)
    return calls


def third_is_nan(out, call):
    """The third sample of a step's second micro batch has no number; the gradient stays finite."""
    if call % 2 == 0:
        return out
    each = out.sample_losses.clone()
    each[2, 0] = math.nan
    return out._replace(loss_sum=out.loss_sum + out.loss_sum.detach() * math.nan, sample_losses=each)


def rows(run_folder, name="metrics.jsonl"):
    return read_rows(run_folder / name)


def test_a_loss_that_is_not_finite_skips_the_step_and_names_its_sample(train, monkeypatch, capsys):
    calls = break_samples(monkeypatch, {2}, third_is_nan)
    trainer = train("runner.max_steps=5")
    assert [row["skipped"] for row in rows(trainer.run.folder)] == [0, 0, 1, 0, 0]
    assert [row["loss"] is None for row in rows(trainer.run.folder)] == [False, False, True, False, False]
    assert float(trainer.optimizer.applied) == 4
    (anomaly,) = rows(trainer.run.folder, "anomalies.jsonl")
    assert (anomaly["step"], anomaly["kind"], anomaly["loss"]) == (3, "skipped", None)
    index = calls[5][2]
    expected = {"where": f"toy, part-0.parquet, episode {index // 10}, frame {index % 10}", "row": index, "loss": None}
    assert anomaly["samples"] == [expected | {"rank": 0, "micro_batch": 1}]
    said = f"step 3: the loss was not finite, the step was skipped; look at {expected['where']} first"
    assert capsys.readouterr().out.count(said) == 1


def test_a_gradient_that_is_not_finite_names_the_largest_losses_first(train, monkeypatch):
    def breaks_gradient(out, call):
        return out._replace(loss_sum=out.loss_sum + (out.loss_sum * 0.0).sqrt())  # Finite, with a gradient of 0/0.

    break_samples(monkeypatch, {1}, breaks_gradient)
    trainer = train("runner.max_steps=3")
    (anomaly,) = rows(trainer.run.folder, "anomalies.jsonl")
    losses = [sample["loss"] for sample in anomaly["samples"]]
    assert (anomaly["step"], anomaly["kind"], len(losses)) == (2, "skipped", 20)
    assert losses == sorted(losses, reverse=True)


def test_a_policy_that_tells_no_losses_of_samples_has_its_micro_batch_named(train, monkeypatch):
    def change(out, call):
        loss = out.loss_sum * math.nan if call % 2 else out.loss_sum
        return out._replace(loss_sum=loss, sample_losses=None)

    break_samples(monkeypatch, {0}, change)
    (anomaly,) = rows(train("runner.max_steps=2").run.folder, "anomalies.jsonl")
    assert [sample["micro_batch"] for sample in anomaly["samples"]] == [1] * 10


def test_a_run_without_anomalies_has_no_file_of_them(train):
    assert not (train("runner.max_steps=2").run.folder / "anomalies.jsonl").exists()


def test_too_many_skipped_steps_in_a_row_end_the_run_and_name_the_last_good_checkpoint(train, tmp_path, monkeypatch):
    break_samples(monkeypatch, {3, 5, 6, 7}, third_is_nan)
    with pytest.raises(UserError, match=r"3 steps in a row were skipped, 6 to 8: .*anomalies\.jsonl") as error:
        train("runner.max_steps=20", "runner.max_skipped_steps=3", "runner.save_interval=2", "runner.keep_last=5")
    assert "step_000000004: write its name into" in str(error.value)
    folder = tmp_path / "run"
    assert [row["step"] for row in rows(folder)] == list(range(1, 9))
    assert [row["step"] for row in rows(folder, "anomalies.jsonl")] == [4, 6, 7, 8]


def test_what_one_rank_meets_skips_and_ends_the_run_on_all_of_them_alike(toy_site, tmp_path, start_ranks):
    distributions.install(tmp_path / "site", "breaks", plugins={"breaks": "breaks"}, breaks=BREAKS_ON_RANK_1)
    settings = (toy_site / "toy.toml", f"runner.output_dir={tmp_path}", "runner.max_skipped_steps=2")
    ended = start_ranks("rlinf_core.train:main", 2, *settings, paths=(toy_site, tmp_path / "site"))
    assert ended.returncode == 2
    assert ended.stderr.count("error: 2 steps in a row were skipped, 2 to 3") == 1
    assert [row["skipped"] for row in rows(tmp_path / "run")] == [0, 1, 1]
    anomalies = rows(tmp_path / "run", "anomalies.jsonl")
    found = [[(sample["rank"], sample["loss"]) for sample in row["samples"]] for row in anomalies]
    assert found == [[(1, None)], [(1, None)]]


def test_a_run_that_has_diverged_blames_no_sample(train, monkeypatch, capsys, tmp_path):
    def diverges(out, call):
        return out._replace(loss_sum=out.loss_sum * math.nan, sample_losses=out.sample_losses * math.nan)

    break_samples(monkeypatch, {1, 2}, diverges)
    with pytest.raises(UserError, match=r"not the cause: the weights have diverged.*again: lower optim\.lr$"):
        train("runner.max_steps=5", "runner.max_skipped_steps=2")
    said = capsys.readouterr().out
    assert "20 of 20 samples have no finite loss, so no single sample explains it" in said
    assert "look at" not in said
    assert "stopped by an error after step 3" in said


@pytest.mark.parametrize(
    ("broken", "together", "diverged"), [(1, 1, False), (10, 1, False), (11, 1, True), (10, 10, False), (20, 20, False)]
)
def test_one_sample_explains_at_most_its_micro_batch(broken, together, diverged):
    assert have_diverged([math.nan] * broken + [1.0] * (20 - broken), together=together) == diverged


def test_no_number_of_skipped_steps_ends_a_run_that_says_so(train, monkeypatch):
    break_samples(monkeypatch, range(12), third_is_nan)
    assert train("runner.max_steps=12", "runner.max_skipped_steps=0").step == 12


def test_anomalies_after_the_checkpoint_are_cut_back(train, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        break_samples(patch, {1, 4}, third_is_nan)
        train("runner.max_steps=5", "runner.save_interval=3")
    folder = tmp_path / "run"
    assert [row["step"] for row in rows(folder, "anomalies.jsonl")] == [2, 5]
    (folder / "latest").write_text("step_000000003")
    train("runner.max_steps=5", "runner.save_interval=3")
    assert [row["step"] for row in rows(folder, "anomalies.jsonl")] == [2]
    assert [row["step"] for row in rows(folder)] == [1, 2, 3, 4, 5]


def test_a_spike_is_flagged_with_its_samples_and_is_not_skipped(train, monkeypatch):
    def spikes(out, call):
        each = out.sample_losses.clone()
        each[4, 0] += 1e4
        return out._replace(loss_sum=out.loss_sum + 1e4, sample_losses=each)

    calls = break_samples(monkeypatch, {FEWEST + 2}, spikes)
    trainer = train(f"runner.max_steps={FEWEST + 4}")
    (anomaly,) = rows(trainer.run.folder, "anomalies.jsonl")
    assert (anomaly["step"], anomaly["kind"]) == (FEWEST + 3, "spike")
    assert anomaly["usual_loss"] < anomaly["loss"] / 10
    assert {sample["row"] for sample in anomaly["samples"][:2]} == {calls[2 * FEWEST + 4 + i][4] for i in (0, 1)}
    assert not any(row["skipped"] for row in rows(trainer.run.folder))


def noisy(count, level=1.0):
    return [level + 0.1 * math.sin(7.0 * number) for number in range(count)]


def test_a_spike_is_far_above_the_median_in_robust_deviations():
    spikes = Spikes(10.0, noisy(50))
    assert spikes.see(1.3) is None
    assert spikes.see(0.0) is None
    assert spikes.see(3.0) == pytest.approx(1.0, abs=0.05)


def test_a_level_that_stays_is_usual_once_half_of_the_window_is():
    spikes = Spikes(10.0, noisy(WINDOW))
    flagged = [spikes.see(loss) is not None for loss in noisy(WINDOW, level=5.0)]
    assert flagged[0]
    assert not any(flagged[WINDOW // 2 + 5 :])


def test_there_are_no_spikes_among_few_losses_nor_among_numbers_that_are_none():
    spikes = Spikes(10.0, noisy(FEWEST - 1))
    assert spikes.see(math.nan) is None
    assert spikes.see(100.0) is None
    assert Spikes(0.0, noisy(50)).see(100.0) is None


def test_a_loss_that_hardly_moves_makes_no_spikes_of_every_movement():
    assert Spikes(10.0, [1.0] * 50).see(1.05) is None
    assert Spikes(10.0, [1.0] * 50).see(1.2) is not None


def test_a_skipped_step_does_not_shift_what_is_usual():
    guard = Guard(RUNNER, History(noisy(50)))
    assert guard.see({"loss": math.inf, "skipped": 1.0}).kind == "skipped"
    assert guard.see({"loss": 5.0, "skipped": 0.0}).expected == pytest.approx(1.0, abs=0.05)


def test_a_run_that_goes_on_compares_with_the_losses_before_it(tmp_path):
    steps = [{"step": step, "loss": float(step), "skipped": float(step == 3)} for step in range(1, 7)]
    text = [*steps[:3], {"step": 3, "val_loss": 9.0}, *steps[3:]]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in text))
    assert read_history(tmp_path, 4) == History([1.0, 2.0, 4.0], skipped=0)
    assert read_history(tmp_path, 3) == History([1.0, 2.0], skipped=1)


def test_a_run_that_goes_on_counts_the_steps_that_were_skipped_before_it(train, monkeypatch):
    break_samples(monkeypatch, range(9), third_is_nan)
    train("runner.max_steps=2", "runner.max_skipped_steps=3")
    break_samples(monkeypatch, range(9), third_is_nan)
    with pytest.raises(UserError, match="3 steps in a row were skipped, 1 to 3"):
        train("runner.max_steps=9", "runner.max_skipped_steps=3")


def test_a_copy_of_a_checkpoint_beside_the_others_is_none_of_them(tmp_path):
    for name in ("step_000000002", "step_000000002_copy", "step_000000009"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.json").touch()
    assert last_checkpoint(tmp_path, 5) == tmp_path / "step_000000002"


def test_suspects_are_those_without_a_number_or_the_largest():
    assert [one.position for one in suspects([1.0, math.nan, 3.0, math.inf])] == [1, 3]
    assert [one.position for one in suspects([1.0, 3.0, 2.0])] == [1, 2, 0]


def test_steps_that_are_read_late_change_nothing_but_when(train, tmp_path, monkeypatch):
    """As on CUDA: guards act on the same steps, resumes are exact; only a stop comes later."""
    settings = ("runner.max_steps=9", "runner.save_interval=4", "runner.keep_last=3", "runner.val_check_interval=3")
    break_samples(monkeypatch, {5}, third_is_nan)
    at_once = train(*settings, "runner.name=at_once")
    monkeypatch.setitem(monitor.LAG, "cpu", 2)
    break_samples(monkeypatch, {5}, third_is_nan)
    late = train(*settings, "runner.name=late")
    (late.run.folder / "latest").write_text("step_000000004")
    break_samples(monkeypatch, {1}, third_is_nan)  # The step with number 6, once more.
    again = train(*settings, "runner.name=late")
    for trainer in (late, again):
        assert numbers(trainer) == numbers(at_once)
        assert rows(trainer.run.folder, "anomalies.jsonl") == rows(at_once.run.folder, "anomalies.jsonl")
        for name, parameter in trainer.policy.named_parameters():
            mine = dict(at_once.policy.named_parameters())[name]
            assert torch.equal(parameter.detach().to_local(), mine.detach().to_local())


@pytest.mark.parametrize(("lag", "stop"), [(0, 2), (2, 4)])
def test_a_signal_stops_a_run_later_by_as_many_steps_as_its_numbers_are(train, monkeypatch, lag, stop):
    monkeypatch.setitem(monitor.LAG, "cpu", lag)

    def asks_to_stop(out, call):
        os.kill(os.getpid(), signal.SIGTERM)
        return out

    break_samples(monkeypatch, {1}, asks_to_stop)
    trainer = train("runner.max_steps=9")
    assert trainer.step == stop
    assert [row["step"] for row in rows(trainer.run.folder)] == list(range(1, stop + 1))
    assert (trainer.run.folder / "latest").read_text() == f"step_{stop:09d}"


def test_steps_before_an_error_are_told_though_they_are_read_late(train, tmp_path, monkeypatch):
    monkeypatch.setitem(monitor.LAG, "cpu", 2)

    def fails(out, call):
        raise ZeroDivisionError

    break_samples(monkeypatch, {4}, fails)
    with pytest.raises(ZeroDivisionError):
        train("runner.max_steps=9")
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2, 3, 4]


def numbers(trainer):
    keys = ("step", "loss", "lr", "grad_norm", "skipped", "val_loss", "epoch")
    return [{key: row[key] for key in keys if key in row} for row in rows(trainer.run.folder)]
