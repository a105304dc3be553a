"""The console tells the ends of a run, its baselines and its loss."""

import io

import pytest
from rich.console import Console

from rlinf_core.loggers.console import ConsoleLogger, by_source, loss_plot, result_table

STEPS = [
    {"step": s, "loss": 2.0 / s, "lr": 1e-3, "grad_norm": 1.0, "samples_per_second": 8.0, "data_wait_share": 0.1}
    for s in range(1, 21)
]


def shown(*things):
    console = Console(file=io.StringIO(), width=100, highlight=False)
    for thing in things:
        console.print(thing)
    return console.file.getvalue()


def test_the_table_compares_with_the_better_baseline():
    validation = {
        "step": 20, "val_loss": 0.5, "val_action_mse": 0.05, "val_action_mse_mean": 0.2, "val_action_mse_repeat": 0.25,
    }  # fmt: skip
    text = shown(result_table("smoke", STEPS, [validation]))
    assert "25% of the better baseline" in text
    assert "0.2000" in text
    assert "0.2500" in text


def test_a_mixture_has_results_of_each_source():
    one = {"val_action_mse": 0.05, "val_action_mse_mean": 0.2, "val_action_mse_repeat": 0.25, "val_loss": 0.3}
    validation = {"step": 20, "val_loss": 0.5, "val_loss/b": 0.7} | {f"{key}/a": value for key, value in one.items()}
    text = shown(result_table("smoke", STEPS, [validation], ["a", "b"]))
    assert text.index("held-out loss") < text.index("a: held-out loss") < text.index("b: held-out loss")
    assert "a: held-out action error²" in text
    assert "25% of the better baseline" in text
    assert dict(by_source({"x": 1.0, "y/z": 2.0}, [])) == {"": {"x": 1.0, "y/z": 2.0}}


def test_the_plot_has_axes_and_points():
    text = loss_plot(STEPS)
    assert "training loss" in text
    assert "20" in text
    assert any("⠀" <= char <= "⣿" for char in text)


@pytest.fixture
def logger(tmp_path):
    from types import SimpleNamespace as Namespace

    run = Namespace(
        folder=tmp_path,
        runner=Namespace(name="smoke", max_steps=20),
        data=Namespace(config_name="toy"),
        sources=[Namespace(name="")],
        policy=Namespace(type="toy"),
        trainer=Namespace(global_batch_size=4),
        optim=Namespace(warmup_steps=10, decay_steps=30),
    )
    return ConsoleLogger(Console(file=io.StringIO(), width=100, highlight=False), run, 0, 20)


def test_first_and_last_step_are_always_shown(logger):
    for row in STEPS:
        logger.step(row["step"], row)
    text = logger._console.file.getvalue()
    assert "step  1/20" in text
    assert "step 20/20" in text
    assert "step 10/20" not in text


def test_a_schedule_that_outlasts_the_run_is_said(logger):
    assert "the learning rate decays until step 30 (optim.decay_steps), after the end of the run" in (
        logger._console.file.getvalue()
    ).replace("\n", " ")


def test_what_ended_the_run_is_said_with_the_way_on(logger, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 7, "loss": 1.0}\n')
    logger.close(RuntimeError())
    (tmp_path / "latest").write_text("step_000000005")
    logger.close(KeyboardInterrupt())
    said = logger._console.file.getvalue()
    assert "smoke: stopped by an error after step 7; nothing was saved yet" in said
    assert "smoke: interrupted after step 7; the same command resumes from step_000000005" in said
