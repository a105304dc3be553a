"""The console tells the ends of a run, its baselines and its loss."""

import io
import os
import re
import sys
import time

import pytest
from rich.console import Console

from rlinf_core.contract.optim import OptimConfig
from rlinf_core.loggers.console import (
    ConsoleLogger,
    RunConsole,
    by_source,
    loss_plot,
    result_table,
    validations_ahead,
)

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


def test_metrics_of_evaluators_have_rows_also_without_a_held_out_loss():
    """A task may have the name of a source, whose losses are measured more often."""
    first, last = {"step": 0, "success": 0.0}, {"step": 20, "success": 0.75, "success/a": 0.5, "ema_success": 1.0}
    text = shown(result_table("smoke", STEPS, [first, last], ["a", "b"]))
    assert re.search(r"^│ success +│ +0.75 │ 0 at step 0 ", text, re.MULTILINE)
    assert re.search(r"^│ ema_success +│ +1 │ at step 20 ", text, re.MULTILINE)
    assert re.search(r"^│ a: success +│ +0.5 │", text, re.MULTILINE)
    assert "held-out" not in text


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
        runner=Namespace(name="smoke", max_steps=20, val_check_interval=0),
        data=Namespace(config_name="toy"),
        sources=[Namespace(name="")],
        policy=Namespace(type="toy"),
        trainer=Namespace(global_batch_size=4),
        optim=OptimConfig(warmup_steps=10, decay_steps=30),
    )
    return ConsoleLogger(Console(file=io.StringIO(), width=100, highlight=False), run, 0, 20)


def test_first_and_last_step_are_always_shown(logger):
    for row in STEPS:
        logger.step(row["step"], row)
    text = logger._console.file.getvalue()
    assert "step  1/20" in text
    assert "step 20/20" in text
    assert "step 10/20" not in text


@pytest.mark.parametrize(
    ("step", "interval", "ahead"), [(1, 0, 0), (1, 20, 1), (20, 20, 1), (1, 8, 3), (8, 8, 3), (9, 8, 2), (17, 8, 1)]
)
def test_validations_to_come_are_counted(step, interval, ahead):
    due = [s for s in range(step, 21) if interval and (s % interval == 0 or s == 20)]
    assert validations_ahead(step, 20, interval) == len(due) == ahead


def test_the_eta_includes_validations_to_come(logger, monkeypatch):
    """A step takes 10 seconds and a validation, every 8 steps and after the last, 100."""
    now = 0.0
    monkeypatch.setattr("rlinf_core.loggers.console.time.monotonic", lambda: now)
    logger._started, logger._run.runner.val_check_interval = 0.0, 8
    for row in STEPS:
        now += 10
        logger.step(row["step"], row)
        if row["step"] in (8, 16):
            now += 100
            logger.validation(row["step"], {"val_loss": 1.0})
    etas = [line.rpartition("ETA ")[2] for line in logger._console.file.getvalue().splitlines() if "ETA" in line]
    assert (etas[0], etas[7]) == ("3:10 + 3 validations", "2:00 + 3 validations")
    assert (etas[8], etas[15], etas[16], etas[19]) == ("5:10", "4:00", "2:10", "1:40")


def test_a_reader_that_is_gone_is_an_error_and_does_not_end_the_process():
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as file, pytest.raises(BrokenPipeError):  # Closing it writes what is buffered.
        RunConsole(file=file).print("step 1/20")


def test_a_schedule_that_outlasts_the_run_is_said(logger):
    assert "the learning rate decays until step 30 (optim.decay_steps), after the end of the run" in (
        logger._console.file.getvalue()
    ).replace("\n", " ")


@pytest.mark.parametrize("latest", [b"step_000000005", b"\xff[/]", None], ids=["named", "damaged", "a folder"])
def test_nothing_in_the_runs_files_or_names_keeps_the_console_from_its_end(configure_toy, tmp_path, latest):
    """Brackets are rich's markup; the file of metrics may hold anything."""
    run = configure_toy("runner.name=ab", f"runner.output_dir={tmp_path / '[red]x[/bold]'}")
    run.folder.mkdir(parents=True)
    lines = (b"a note", b"", b'{"step": 7, "loss": 1.0}', b'{"step": 8, "loss": "low"}', b"\xff", b"")
    (run.folder / "metrics.jsonl").write_bytes(b"\n".join(lines))
    (run.folder / "latest").mkdir() if latest is None else (run.folder / "latest").write_bytes(latest)
    console = RunConsole(file=io.StringIO(), width=300, highlight=False)
    logger = ConsoleLogger(console, run, 0, 20)
    logger.validation(7, {"val_loss": 0.5, "val_[/]": 1.0})
    logger.close(RuntimeError())
    logger.close(None)
    said = console.file.getvalue()
    assert f"ab starts: trainable_toy on toy, 20 steps of 20 samples, files in {run.folder}" in said
    assert "ab: stopped by an error after step 7; " in said
    assert "ab: 7 steps" in said


def test_what_ended_the_run_is_said_with_the_way_on(logger, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 7, "loss": 1.0}\n')
    logger.close(RuntimeError())
    (tmp_path / "latest").write_text("step_000000005")
    logger.close(KeyboardInterrupt())
    said = logger._console.file.getvalue()
    assert "smoke: stopped by an error after step 7; nothing was saved yet" in said
    assert "smoke: interrupted after step 7; the same command resumes from step_000000005" in said


class Terminal(io.StringIO):
    """A terminal that keeps what it shows: lines, of which escape sequences go up and erase."""

    def isatty(self):
        return True

    def screen(self):
        lines, row = [""], 0
        for part in re.split(r"(\n|\r|\x1b\[1A|\x1b\[2K|\x1b\[[0-9;?]*[A-Za-z])", self.getvalue()):
            if part == "\n":
                row += 1
                lines += [""] * (row == len(lines))
            elif part == "\x1b[1A":
                row -= 1
            elif part == "\x1b[2K":
                lines[row] = ""
            elif part and not part.startswith(("\r", "\x1b")):
                lines[row] += part
        return [line.rstrip() for line in lines if line.strip()]


@pytest.fixture
def live(tmp_path, logger):
    """A logger with a display on a terminal of 100 columns."""
    terminal = Terminal()
    console = RunConsole(file=terminal, force_terminal=True, width=100, highlight=False, color_system=None)
    (tmp_path / "latest").write_text("step_000000004")
    live = ConsoleLogger(console, logger._run, 0, 20, live=True)
    yield live, console, terminal
    live.close(KeyboardInterrupt())


def test_a_terminal_shows_a_bar_and_the_last_step_below_messages(live):
    logger, _, terminal = live
    for row in STEPS[:5]:
        logger.step(row["step"], {**row, "peak_memory_gb": 3.0, "mfu": 0.4})
    logger.message("step 5: saved")
    logger.validation(5, {"val_loss": 0.25})
    logger.step(20, STEPS[19])
    *above, bar, numbers, saved, validated = terminal.screen()
    assert [line for line in above if line.startswith("step ")] == ["step 5: saved", "step 5:  held-out loss 0.2500"]
    assert re.fullmatch(r"smoke +━+ +20/20 100% ETA 0:00", bar)
    assert "loss 0.1000  lr 1.00e-03  grad norm 1.000  8.0 samples/s  data wait 10%" in numbers
    assert (saved, validated) == ("last save: step_000000004", "last validation: step 5: held-out loss 0.2500")
    assert "\x1b[?25l" not in terminal.getvalue()  # The cursor is never hidden: who is killed cannot show it again.


def test_a_display_fits_a_terminal_that_became_narrow_and_is_gone_at_the_end(live):
    logger, console, terminal = live
    logger.step(1, STEPS[0])
    console.size = (40, 20)
    logger.step(20, STEPS[19] | {"peak_memory_gb": 3.0})
    bar, numbers, saved = terminal.screen()[-3:]
    assert max(map(len, (bar, numbers, saved))) <= 40
    assert (bar[:5], bar[-8:], numbers[-1]) == ("smoke", "ETA 0:00", "…")
    logger.close(KeyboardInterrupt())
    assert any(line.startswith("smoke: interrupted after step") for line in terminal.screen())
    assert not any("ETA" in line for line in terminal.screen())


def test_a_display_costs_a_step_little_and_prints_of_others_come_above(live):
    logger, _, terminal = live
    logger.step(1, STEPS[0])
    before = time.process_time()
    for _ in range(1000):
        logger.step(2, STEPS[1])
    assert time.process_time() - before < 1000 * 500e-6  # 1 % of a step of 50 ms.
    print("a hook prints")
    shown = terminal.screen()
    assert shown.index("a hook prints") < next(row for row, line in enumerate(shown) if "ETA" in line)


def test_a_forked_process_prints_directly(live, capfd):
    logger, *_ = live
    logger.step(1, STEPS[0])
    assert sys.stdout.__class__.__name__ == "FileProxy"
    if not (child := os.fork()):
        os.write(2, sys.stdout.__class__.__name__.encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert "FileProxy" not in capfd.readouterr().err
