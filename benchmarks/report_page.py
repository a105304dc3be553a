"""How large the page of `rlinf report` is for a run of 30,000 steps, and how long a browser takes to open it.

    python benchmarks/report_page.py [--steps 30000] [--rounds 5] [--json]

The run is written by the run's own metrics logger: 40 metrics per step, with spikes and NaN, and a validation every 500
steps. The page is opened in a headless Chromium or Chrome on PATH, in a profile of its own; `open_seconds` is the
browser's own clock from the start of navigation to the end of loading, `first_paint_seconds` to the first text, both
the median over the rounds. Without a browser, only sizes are measured.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
from reporting.result_line import ResultLine

from rlinf_core import cli
from rlinf_core.loggers.jsonl import JsonlLogger, RowFile

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
ASK = """<script>addEventListener("load", () => setTimeout(() => {
  const [page] = performance.getEntriesByType("navigation"), [paint] = performance.getEntriesByType("paint");
  const found = { open: page.loadEventStart, paint: paint ? paint.startTime : page.domInteractive };
  document.body.innerHTML = ""; document.body.append(JSON.stringify(found)); }, 0))</script>"""
QUIET = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-sync --dump-dom"


def write_run(folder: Path, steps: int) -> None:
    """The folder of a run of so many steps."""
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(f'seed = 0\n[runner]\nname = "arm"\nmax_steps = {steps}\n')
    random = np.random.default_rng(0)
    logger = JsonlLogger(RowFile(folder / "metrics.jsonl"))
    losses = np.exp(-np.arange(steps) / 3000) + random.gamma(2, 0.01, steps)
    noise = random.random((steps, 40))
    for step, (loss, values) in enumerate(zip(losses.tolist(), noise.tolist(), strict=True), start=1):
        shares = dict(zip(("data_wait_share", "forward_share", "backward_share"), (0.02, 0.3, 0.5), strict=True))
        others = {f"grad_norm/layer_{number}": value for number, value in enumerate(values)}
        bad = {"grad_norm": float("nan")} if step % 997 == 0 else {"grad_norm": loss}
        logger.step(step, {"loss": loss, "lr": 5e-5, "samples_per_second": 900.0, **shares, **bad, **others})
        if step % 500 == 0:
            logger.validation(step, {"val_loss": loss, "ema_val_loss": loss, "val_action_mse": loss})
    logger.close(None)


def open_page(browser: str, page: Path, scratch: Path) -> dict[str, float]:
    """Seconds until the page is painted and loaded, by the browser's clock."""
    asked = scratch / "asked.html"
    text = re.sub(r'<meta http-equiv="Content-Security-Policy".*?>', "", page.read_text(encoding="utf-8"))
    asked.write_text(text + ASK, encoding="utf-8")
    profile = tempfile.mkdtemp(dir=scratch)
    command = [browser, *QUIET.split(), f"--user-data-dir={profile}", "--window-size=1400,2000", asked.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r"<body>(\{.*\})</body>", done.stdout, re.DOTALL)
    assert found, done.stderr
    return {name: milliseconds / 1000 for name, milliseconds in json.loads(found[1]).items()}


def main() -> None:
    """Measure, and print the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print one JSON object on the last line")
    options = parser.parse_args()
    line = ResultLine("report_page", wanted=options.json)
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "arm"
        write_run(folder, options.steps)
        metrics = (folder / "metrics.jsonl").stat().st_size
        began, computed = time.perf_counter(), time.process_time()
        assert cli.main(["report", str(folder)]) == 0
        seconds, cpu = time.perf_counter() - began, time.process_time() - computed
        page = folder / "report.html"
        text = page.read_text(encoding="utf-8")
        results = {
            "page_mb": page.stat().st_size / 1e6,
            "metrics_mb": metrics / 1e6,
            "elements": float(len(re.findall(r"<[a-zA-Z]", text))),
            "path_mb": sum(len(one) for one in re.findall(r'\bd="([^"]*)"', text)) / 1e6,
            "write_seconds": seconds,
            "write_cpu_seconds": cpu,
        }
        rounds = [open_page(browser, page, Path(scratch)) for _ in range(options.rounds)] if browser else []
    if rounds:
        results["open_seconds"] = statistics.median(one["open"] for one in rounds)
        results["first_paint_seconds"] = statistics.median(one["paint"] for one in rounds)
    opened = f"opens in {results['open_seconds']:.2f} s" if rounds else "no browser is on PATH"
    line.write(
        results,
        f"{options.steps} steps: {results['page_mb']:.2f} MB, {results['elements']:.0f} elements; {opened}",
        rounds=rounds,
        settings=vars(options),
    )


if __name__ == "__main__":
    main()
