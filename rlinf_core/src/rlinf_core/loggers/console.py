"""Console output: on a terminal a display that is repainted, elsewhere a line every few seconds; a table and a plot at
the end. Torch-free.
"""

from __future__ import annotations

import errno
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from rlinf_core.contract.run import Logger, LoggerConfig, RunConfig
from rlinf_core.loggers.jsonl import METRICS_FILE, read_metrics
from rlinf_core.loggers.live import LiveDisplay
from rlinf_core.untrusted.text import printable

SECONDS_BETWEEN_LINES = 10.0
SHOWN = {
    "loss": "loss [bold]{:.4f}[/]",
    "lr": "lr {:.2e}",
    "grad_norm": "grad norm {:.3f}",
    "samples_per_second": "{:.1f} samples/s",
    "mfu": "MFU {:.1%}",
    "data_wait_share": "data wait {:.0%}",
}
"""The trainer's metrics that a line shows, with their format."""
ALSO_LIVE = {"peak_memory_gb": "memory {:.1f} GB", "epoch": "epoch {:.2f}"}
"""Metrics that a terminal's display shows besides these."""
PLOT_SIZE = (76, 16)
"""Columns and rows of the plot in characters."""


class ConsoleLoggerConfig(LoggerConfig):
    """Shows the progress of a run. Always on."""

    type: Literal["console"] = "console"
    live: bool = True
    """On a terminal, show the progress in lines that are repainted. If false, or if the output is piped, print a line
    every few seconds."""

    def build(self, run: RunConfig, *, start_step: int, stop_step: int) -> Logger:
        """Print the run's name, size and folder."""
        # torchrun's children write to a pipe; 100 columns fit every table.
        console = RunConsole(width=None if Console().is_terminal else 100, highlight=False)
        live = self.live and console.is_terminal and not console.is_dumb_terminal
        return ConsoleLogger(console, run, start_step, stop_step, live=live)


class RunConsole(Console):
    """rich's console, except that a reader that is gone (`| head`) is an error and does not end the process."""

    def show_cursor(self, show: bool = True) -> bool:
        """A display never hides the cursor: a process that is killed could not show it again."""
        return False

    def on_broken_pipe(self) -> None:
        """Called by rich while it handles the error."""
        # What is still buffered would fail again when Python exits, and change the exit code.
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), self.file.fileno())
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


class ConsoleLogger:
    """Prints the first and last step, and one in between every few seconds; or keeps a display up to date."""

    def __init__(
        self, console: Console, run: RunConfig, start_step: int, stop_step: int, *, live: bool = False
    ) -> None:
        self._console, self._run = console, run
        self._started, self._start_step, self._stop_step = time.monotonic(), start_step, stop_step
        self._last_line = float("-inf")
        self._last_step = self._started
        self._validated, self._validating = 0, 0.0
        """Validations so far, and the seconds that they took together."""
        self._display = LiveDisplay(console, run.runner.name, stop_step) if live else None
        self._last_validation = ""
        where = f"continues at step {start_step}" if start_step else "starts"
        self._sources = [source.name for source in run.sources if source.name]
        datasets = " + ".join(self._sources or [run.data.config_name])
        with suppress(OSError, ValueError):  # If nothing can be printed, the first step fails too, and is reported.
            self._print(
                f"[bold]{escape(run.runner.name)}[/] {where}: {run.policy.type} on {escape(datasets)}, "
                f"{stop_step} steps of {run.trainer.global_batch_size} samples, files in {escape(str(run.folder))}"
            )
            self._note_schedule()

    def _note_schedule(self) -> None:
        if note := self._run.optim.note(self._stop_step):
            self._print(f"[yellow]note: {escape(note)}[/]")

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Print the step if enough time has passed since the last line."""
        now = self._last_step = time.monotonic()
        if self._display is not None:
            self._display.update(
                step, self._time_left(step, now), self._live_lines(metrics), now=step == self._stop_step
            )
            return
        if now - self._last_line < SECONDS_BETWEEN_LINES and step != self._stop_step:
            return
        self._last_line = now
        shown = [form.format(metrics[name]) for name, form in SHOWN.items() if name in metrics]
        position = f"step {step:>{len(str(self._stop_step))}}/{self._stop_step}"
        self._print("  ".join([position, *shown, f"ETA {self._time_left(step, now)}"]))

    def _live_lines(self, metrics: Mapping[str, float]) -> list[str]:
        """The lines below the bar: metrics of the step, the last save, the last validation."""
        forms = {name: form.replace("[bold]", "").replace("[/]", "") for name, form in (SHOWN | ALSO_LIVE).items()}
        shown = [form.format(metrics[name]) for name, form in forms.items() if name in metrics]
        saved = f"last save: {self._saved()}" if self._saved() else "nothing saved yet"
        return ["  ".join(shown), saved, self._last_validation]

    def _saved(self) -> str:
        """The name of the newest checkpoint."""
        try:
            return (self._run.folder / "latest").read_text(encoding="utf-8", errors="replace").strip()
        except OSError:
            return ""

    def _time_left(self, step: int, now: float) -> str:
        """Until the end of the run: the steps and, once one has shown how long it takes, the validations to come."""
        training = now - self._started - self._validating
        left = training / (step - self._start_step) * (self._stop_step - step)
        ahead = validations_ahead(step, self._stop_step, self._run.runner.val_check_interval)
        if not ahead or self._validated:
            return _duration(left + ahead * self._validating / max(self._validated, 1))
        return f"{_duration(left)} + {ahead} validation{'s' * (ahead > 1)}"

    def validation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Print a validation; for a mixture also one line per source."""
        self._validated += 1
        self._validating += time.monotonic() - self._last_step
        for name, own in by_source(metrics, self._sources):
            if not name:
                self._last_validation = f"last validation: step {step}:{self._measured(own)}"
            self._print(f"[cyan]step {step}: {escape(name)}{':' * bool(name)}{escape(self._measured(own))}[/]")

    def _measured(self, metrics: Mapping[str, float]) -> str:
        line = ""
        if "val_loss" in metrics:
            line += f" held-out loss {metrics['val_loss']:.4f}{_of_ema(metrics, 'val_loss')}"
        else:  # From a trainer with other metrics.
            line += " " + ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        line += "".join(
            f", {_words(name)} {metrics[name]:.4g}{_of_ema(metrics, name)}" for name in _of_the_policy(metrics)
        )
        if "val_action_mse" in metrics:
            line += (
                f", action error² {metrics['val_action_mse']:.4f}{_of_ema(metrics, 'val_action_mse')} "
                f"(mean action {metrics['val_action_mse_mean']:.4f}, "
                f"repeated action {metrics['val_action_mse_repeat']:.4f})"
            )
        if "val_loss" in metrics:
            line += "".join(f", {name} {metrics[name]:.4g}" for name in _of_evaluators(metrics))
        return line

    def message(self, text: str) -> None:
        """Print a message."""
        self._console.print(Text(printable(text), style="dim"), soft_wrap=not self._console.file.isatty())

    def close(self, error: BaseException | None) -> None:
        """Print how the run ended: the result table and a plot of the loss."""
        if self._display is not None:
            self._display.stop()
        # The file has null for NaN and infinity.
        read = read_metrics(self._run.folder / METRICS_FILE)
        rows = [{k: math.nan if v is None else v for k, v in row.items()} for row in read]
        steps = [row for row in rows if math.isfinite(row.get("loss", math.nan))]
        if error is not None:
            done = [row["step"] for row in rows if "loss" in row]  # Includes skipped steps.
            self._print_why_stopped(error, int(done[-1]) if done else 0)
            return
        validations = [row for row in rows if "loss" not in row]
        self._console.print(result_table(self._run.runner.name, steps, validations, self._sources))
        if len(steps) > 1:
            self._console.print(Text.from_ansi(loss_plot(steps)))

    def _print_why_stopped(self, error: BaseException, step: int) -> None:
        why = "interrupted" if isinstance(error, KeyboardInterrupt) else "stopped by an error"
        named = self._saved()
        way_on = f"the same command resumes from {named}" if named else "nothing was saved yet"
        self._print(f"[red]{escape(f'{self._run.runner.name}: {why} after step {step}; {way_on}')}[/]")

    def _print(self, line: str) -> None:
        self._console.print(printable(line), soft_wrap=not self._console.file.isatty())


def validations_ahead(step: int, stop_step: int, interval: int) -> int:
    """Validations from a step on, whose own is not done yet: after every `interval` steps, and after the last one."""
    if not interval:
        return 0
    return stop_step // interval - (step - 1) // interval + (stop_step % interval > 0)


def by_source(metrics: Mapping[str, float], sources: Sequence[str]) -> Iterator[tuple[str, dict[str, float]]]:
    """Split metrics by source: first the overall ones under the name "", then each source's without its suffix."""
    own = {key for key in metrics if key.rpartition("/")[2] in sources and "/" in key}
    yield "", {key: value for key, value in metrics.items() if key not in own}
    for name in sources:
        if found := {key.removesuffix(f"/{name}"): metrics[key] for key in metrics if key.endswith(f"/{name}")}:
            yield name, found


def result_table(
    name: str,
    steps: Sequence[Mapping[str, Any]],
    validations: Sequence[Mapping[str, Any]],
    sources: Sequence[str] = (),
) -> Table:
    """First and last loss, and the held-out action error next to two baselines that ignore the observation."""
    table = Table(title=f"{escape(name)}: {steps[-1]['step'] if steps else 0} steps", title_justify="left")
    table.add_column("result")
    table.add_column("value", justify="right")
    table.add_column("")
    if steps:
        few = min(8, len(steps))
        ends = [sum(row["loss"] for row in part) / few for part in (steps[:few], steps[-few:])]
        table.add_row(f"training loss, first {few} steps", f"{ends[0]:.4f}", "")
        table.add_row(f"training loss, last {few} steps", f"{ends[1]:.4f}", f"{ends[1] / ends[0]:.0%} of the first")
    if validations:
        first, last = (dict(by_source(validation, sources)) for validation in (validations[0], validations[-1]))
        start = validations[0]["step"] if len(validations) > 1 else None
        for source, result in last.items():
            at = f"at step {validations[-1]['step']}"
            before = {} if start is None else {n: f"{v:.4g} at step {start}" for n, v in first.get(source, {}).items()}
            _add_results(table, f"{source}: " * bool(source), result, at, before)
    return table


def _add_results(table: Table, source: str, result: Mapping[str, float], at: str, before: Mapping[str, str]) -> None:
    """The rows of a validation, or of one source in it."""
    if "val_loss" in result:
        table.add_row(f"{source}held-out loss", f"{result['val_loss']:.4f}", at)
    for name in _of_the_policy(result):
        table.add_row(escape(f"{source}held-out {_words(name)}"), f"[bold]{result[name]:.4g}[/]", before.get(name, ""))
    if "val_action_mse" in result:
        baselines = {
            "always the mean action": result["val_action_mse_mean"],
            "repeating the last action": result["val_action_mse_repeat"],
        }
        best = min(baselines.values())
        error = result["val_action_mse"]
        table.add_row(
            f"{source}held-out action error²", f"[bold]{error:.4f}[/]", f"{error / best:.0%} of the better baseline"
        )
        if "ema_val_action_mse" in result:
            ema = result["ema_val_action_mse"]
            table.add_row("  with EMA weights", f"[bold]{ema:.4f}[/]", f"{ema / best:.0%} of the better baseline")
        for baseline, value in baselines.items():
            table.add_row(f"  {baseline}", f"{value:.4f}", "")
    for name in _of_evaluators(result):
        table.add_row(escape(f"{source}{name}"), f"[bold]{result[name]:.4g}[/]", before.get(name, at))


def loss_plot(steps: Sequence[Mapping[str, Any]]) -> str:
    """The loss over steps as text with ANSI colours."""
    import plotext

    plotext.clear_figure()
    plotext.theme("clear")
    plotext.plot_size(*PLOT_SIZE)
    plotext.title("training loss")
    plotext.plot([row["step"] for row in steps], [row["loss"] for row in steps], marker="braille")
    plotext.xlabel("step")
    return str(plotext.build())


def _of_the_policy(metrics: Mapping[str, float]) -> list[str]:
    """The names of the policy's own validation metrics."""
    return [n for n in metrics if n.startswith("val_") and n != "val_loss" and not n.startswith("val_action_mse")]


def _of_evaluators(metrics: Mapping[str, float]) -> list[str]:
    """The names of the metrics of other evaluators than core's."""
    return [n for n in metrics if not n.removeprefix("ema_").startswith("val_") and n != "step"]


def _words(name: str) -> str:
    return name.removeprefix("val_").replace("_", " ")


def _of_ema(metrics: Mapping[str, float], name: str) -> str:
    return f" (EMA {metrics[f'ema_{name}']:.4f})" if f"ema_{name}" in metrics else ""


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
