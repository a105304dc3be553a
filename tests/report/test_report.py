"""The page of `rlinf report`, of runs written as trainers and evaluators write them, also in a browser."""

import json
import math
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image
from video_files import write_video

from rlinf_core import cli
from rlinf_core.report.page import PAGE
from rlinf_core.report.plots import thin
from rlinf_core.report.runs import Curve, config_differences, read_run, time_shares
from rlinf_core.results import ActionErrors, PredictedChunk, ResultTable, wilson_interval

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
EVIL = '"><script>alert(1)</script>\x1b[31m'
STEPS = 30_000


def write_run(folder, steps, seed=0, lr=5e-5, evil=""):
    """A run of so many steps, with validations, a simulator's files and an anomaly."""
    generator = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    name, task = json.dumps(f"arm{seed}"), f"put the bowl {evil}"
    config = f"seed = {seed}\n[runner]\nname = {name}\nmax_steps = {steps}\n[optim]\nlr = {lr}\n"
    (folder / "config.toml").write_text(config + f"[data]\nrepo_id = {json.dumps(evil or 'lab/arm')}\n")
    (folder / "environment.json").write_text(json.dumps({"ranks": 8, "device": "H200", "commit": evil}))
    (folder / "exit.json").write_text(json.dumps({"reason": "finished", "message": evil}))
    shares = dict(zip(("data_wait", "forward", "backward", "optimizer"), (0.05, 0.3, 0.5, 0.1), strict=True))
    fixed = {f"{phase}_share": share for phase, share in shares.items()}
    fixed |= {"lr": lr, "skipped": 0.0, "samples_per_second": 900.0, "step_seconds": 0.25, "mfu": 0.4}
    losses = (np.exp(-np.arange(steps) / 3000) + generator.gamma(2, 0.01, steps)).tolist()
    with (folder / "metrics.jsonl").open("w") as file:
        for step, loss in enumerate(losses, start=1):
            file.write(json.dumps({"step": step, "loss": loss, f"grad/{evil or 'layer'}": loss, **fixed}) + "\n")
            if step % (steps // 10) == 0:
                errors = {"val_action_mse": 0.1, "val_action_mse_mean": 0.3, "val_action_mse_repeat": 0.2}
                metrics = {**errors, "val_loss": loss, "ema_val_loss": loss, "success": 0.5}
                file.write(json.dumps({"step": step, **metrics}) + "\n")
    anomaly = {"step": 7, "kind": "spike", "loss": 3.5, "usual_loss": None, "samples": [{"where": f"episode 3 {evil}"}]}
    (folder / "anomalies.jsonl").write_text(json.dumps(anomaly) + "\n" + json.dumps({"step": 9}) + "\n")
    (folder / "first_batch").mkdir()
    Image.fromarray(generator.integers(0, 255, (64, 64, 3), np.uint8)).save(folder / "first_batch" / "sample1_base.png")
    matrix = (0.2 + generator.random((8, 4))).tolist()
    chunk = PredictedChunk(where=f"row {evil}", recorded=matrix, predicted=matrix)
    names = (f"x{evil}", "y", "z", "")
    baselines = {"mean action": matrix, "repeated action": matrix}
    errors = ActionErrors(
        rows=9, names=names, counts=(9,) * 8, rmse=matrix, mae=matrix, baselines=baselines, chunks=(chunk,)
    )
    rows = ((task, wilson_interval(30, 50), 50), ("push", wilson_interval(0, 50), None))
    table = ResultTable(title=f"Success {evil}", columns=("task", "success", "episodes"), rows=rows)
    for weights in ("", "ema_"):
        held_out = folder / "evaluations" / "held_out" / f"{weights}step_{steps:09d}"
        simulator = folder / "evaluations" / "simulator" / f"{weights}step_{steps:09d}"
        held_out.mkdir(parents=True)
        (held_out / "held_out.actions.json").write_bytes(errors.to_json())
        write_video(simulator / "videos" / "success_0.mp4", 3)
        (simulator / "success.table.json").write_bytes(table.to_json())
        (simulator / "broken.actions.json").write_text('{"rows": 1}')
        (simulator / "log.txt").write_text(f"timed out {evil}")
        (simulator / "odd.bin").write_bytes(b"\0")
    return folder


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The report of a run of 30,000 steps, whose texts come from someone evil."""
    folder = write_run(tmp_path_factory.mktemp("runs") / "arm", STEPS, evil=EVIL)
    assert cli.main(["report", str(folder)]) == 0
    return folder / "report.html"


def test_the_page_is_small_and_loads_nothing(page):
    text = page.read_text(encoding="utf-8")
    assert page.stat().st_size < 5e6
    assert "<script" not in text
    assert "\x1b" not in text
    outside = re.findall(r'(?:src|href|url\()\s*=?\s*["\']?(?!data:|#|"#)([^"\'\s>)]+)', text)
    assert [one for one in outside if "//" in one or one.startswith("http")] == []
    assert "default-src 'none'" in text


def test_what_a_run_left_is_on_the_page(page):
    text = page.read_text(encoding="utf-8")
    for part in (
        *("30000 of 30000", "40.0% (median)", "900 (median)", "2:05:00", "0.6 (0.4618 to 0.7239)", "0 (0 to 0.07135)"),
        *("Where the time of a step goes", "RMSE per dimension", "simulator, step 30000, averaged weights", "spike"),
        *("data:video/mp4;base64,", "data:image/png;base64,", "is not a ActionErrors", "not a kind of file", "3.5"),
    ):
        assert part in text, part
    # The fact, commit, environment, state, config, anomaly, table, task, where, log ...
    assert text.count("&lt;script&gt;") >= 10
    assert text.count("<video") == 2


def test_runs_are_compared_with_the_settings_that_differ(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runs = [write_run(tmp_path / name, 20, seed, lr) for name, seed, lr in (("one", 1, 1e-4), ("two", 2, 2e-4))]
    assert config_differences([read_run(run) for run in runs]) == [
        ("optim.lr", ["0.0001", "0.0002"]), ("runner.name", ["arm1", "arm2"]), ("seed", ["1", "2"]),
    ]  # fmt: skip
    assert cli.main(["report", *map(str, runs), "--output", "both.html"]) == 0
    text = (tmp_path / "both.html").read_text(encoding="utf-8")
    assert "Settings that differ" in text
    assert re.search(r'<th class="mono">optim.lr</th><td>0.0001</td><td>0.0002</td>', text)
    (tmp_path / "mine.html").write_text("<p>notes")
    assert cli.main(["report", str(runs[0]), "--output", "mine.html"]) == 2
    assert "mine.html is not an earlier page of rlinf report" in capsys.readouterr().err
    PAGE.check_output(tmp_path / "both.html")  # An earlier report is replaced.
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "name the folder of a run" in capsys.readouterr().err


def test_a_run_that_has_just_started_or_whose_files_are_damaged_has_a_page(tmp_path):
    folder = tmp_path / "new"
    folder.mkdir()
    (folder / "config.toml").write_text("[")
    assert cli.main(["report", str(folder)]) == 0
    assert "No step has been recorded yet" in (folder / "report.html").read_text()
    (folder / "metrics.jsonl").write_text(
        '{"step": 1, "loss": null}\n{"step": 1, "val_loss": null}\n{"step": "x"}\nbad'
    )
    (folder / "exit.json").write_text("[]")
    (folder / "evaluations" / "sim" / "step_000000001").mkdir(parents=True)
    (folder / "evaluations" / "sim" / "step_000000001" / "frame.png").write_bytes(b"no image")
    (folder / "evaluations" / "sim" / "latest").mkdir()
    assert cli.main(["report", str(folder)]) == 0
    assert "frame.png" in (folder / "report.html").read_text()


def test_long_curves_are_thinned_to_means_and_ranges():
    values = np.arange(1000.0)
    values[500:510] = np.nan
    curve = thin(Curve(np.arange(1.0, 1001.0), values), most=100)
    assert len(curve.steps) == 100
    assert (curve.steps[0], curve.mean[0], curve.low[0], curve.high[0]) == (10, 4.5, 0, 9)
    assert curve.steps[-1] == 1000
    assert np.isnan(curve.mean[50])
    assert np.isfinite(np.delete(curve.mean, 50)).all()


def test_the_rest_of_a_step_is_what_no_phase_took(tmp_path):
    shares = time_shares(read_run(write_run(tmp_path / "arm", 10)))
    assert list(shares) == ["data_wait", "forward", "backward", "optimizer", "other"]
    assert shares["other"].values == pytest.approx(0.05)


def test_wilson_intervals():
    """Against SciPy's."""
    from scipy.stats import binomtest

    for successes, trials in ((0, 10), (3, 20), (20, 20)):
        expected = binomtest(successes, trials).proportion_ci(method="wilson")
        found = wilson_interval(successes, trials)
        assert (found.value, found.low, found.high) == pytest.approx((successes / trials, *expected), abs=1e-6)


@pytest.mark.parametrize("rows", [[["a", 1.0]], [["a", math.inf, 1]]])
def test_a_table_that_is_none_is_refused_where_it_is_made(rows):
    with pytest.raises(ValueError, match=r"row 0 has 2 cells, not 3|finite"):
        ResultTable(title="t", columns=("a", "b", "c"), rows=rows)


ASK = """<script>addEventListener("load", () => {
  const ready = performance.now();
  const broken = [...document.images].filter(image => !image.complete || !image.naturalWidth).length;
  const plots = [...document.querySelectorAll("figure > svg")].map(one => one.getBoundingClientRect().height);
  const widths = [...document.querySelectorAll("figure > svg")].map(one => one.getBoundingClientRect().width);
  const sections = [...document.querySelectorAll("h2")].map(one => one.textContent.trim());
  const videos = document.querySelectorAll("video").length;
  const root = document.documentElement;
  const wide = root.scrollWidth - root.clientWidth;
  const found = { images: document.images.length, broken, plots, widths, sections, videos, wide, ready };
  document.body.innerHTML = ""; document.body.append(JSON.stringify(found)); })</script>"""


@pytest.mark.browser
@pytest.mark.parametrize("width", [500, 1400])
def test_a_browser_shows_the_page(page, tmp_path, width):
    """The page with a script after it that reports what the browser made of it; the page's own policy allows none."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if not browser:
        pytest.skip(f"none of {', '.join(BROWSERS)} is on PATH")
    asked = tmp_path / "asked.html"
    text = re.sub(r'<meta http-equiv="Content-Security-Policy".*?>', "", page.read_text(encoding="utf-8"))
    asked.write_text(text + ASK, encoding="utf-8")
    quiet = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    quiet += "--disable-component-update --disable-sync --enable-logging=stderr --dump-dom"
    command = [browser, *quiet.split(), f"--user-data-dir={tmp_path}/user", f"--window-size={width},2000"]
    result = subprocess.run([*command, asked.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in result.stderr
    found = json.loads(re.search(r"<body>(\{.*\})</body>", result.stdout, re.DOTALL)[1])
    assert found["ready"] < 10_000  # Milliseconds until all is loaded; below 2 s on a machine that does nothing else.
    assert (found["images"], found["broken"], found["videos"]) == (1, 0, 2)
    assert found["wide"] <= 0
    assert min(found["plots"]) > 50
    assert min(found["widths"]) >= 600  # Labels can be read; on narrow pages the plots scroll.
    assert found["sections"] == [
        *("Run", "Loss", "Throughput", "Other metrics of steps", "Where the time of a step goes"),
        *("Errors of sampled actions", "Evaluations", "Anomalies", "First batch, as the model sees it"),
        "Config and environment",
    ]
