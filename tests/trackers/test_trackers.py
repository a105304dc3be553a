"""Trackers follow a run's folder in processes of their own; each one's own reader reads back what it has logged."""

import json
import os
import signal
import sqlite3
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from video_files import write_video

from rlinf_core import UserError, cli
from rlinf_core.results import ActionErrors, Estimate, PredictedChunk, ResultTable
from rlinf_plugins_trackers import logger as process
from rlinf_plugins_trackers.config import TRACKERS, SwanLabConfig, TensorBoardConfig
from rlinf_plugins_trackers.follow import Follower
from rlinf_plugins_trackers.memory import Job, Memory

HEAVY = [pytest.param(name, marks=pytest.mark.slow) for name in ("wandb", "swanlab", "trackio")]


class Run:
    """A run's folder, as the trainer writes it."""

    def __init__(self, folder):
        self.folder = folder
        folder.mkdir()
        (folder / "config.toml").write_text("seed = 7\n[runner]\nname = 'arm'\n")
        (folder / "environment.json").write_text('{"commit": "abc"}')
        (folder / "first_batch").mkdir()
        Image.fromarray(np.full((8, 8, 3), 99, np.uint8)).save(folder / "first_batch" / "sample1_base.png")

    def step(self, *steps, **values):
        with (self.folder / "metrics.jsonl").open("a") as file:
            for step in steps:
                file.write(json.dumps({"step": step, "loss": 1 / step, "lr": None} | values) + "\n")

    def validate(self, step):
        folder = self.folder / "evaluations" / "sim" / f"step_{step:09d}"
        (folder / "videos").mkdir(parents=True)
        rate = Estimate(value=0.5, low=0.2, high=0.8)
        table = ResultTable(title="success", columns=("task", "rate"), rows=(("open | close", rate), ("push", 0.25)))
        (folder / "tasks.table.json").write_bytes(table.to_json())
        zeros = [[0.5, 0.25]] * 2
        chunk = PredictedChunk(where="row 1", recorded=zeros, predicted=zeros)
        errors = ActionErrors(
            rows=1, names=("x", ""), counts=(1, 1), rmse=zeros, mae=zeros, baselines={"mean": zeros}, chunks=(chunk,)
        )
        (folder / "arm.actions.json").write_bytes(errors.to_json())
        write_video(folder / "videos" / "0.mp4", [np.full((64, 64, 3), 9, np.uint8)] * 3)
        (folder / "broken.table.json").write_text("[")
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, "val_loss": 0.5}) + "\n")

    def cut_back(self, step):
        """As the trainer does when it resumes: the file is replaced."""
        path = self.folder / "metrics.jsonl"
        kept = [line for line in path.read_text().splitlines(True) if json.loads(line)["step"] <= step]
        path.with_suffix(".tmp").write_text("".join(kept))
        path.with_suffix(".tmp").replace(path)


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path / "arm")


class Recorder:
    """A tracker that notes what it gets; `dies_at`: the step that it does not survive."""

    def __init__(self, dies_at=None):
        self.rows, self.others, self.dies_at = [], [], dies_at

    def metrics(self, step, values):
        if step == self.dies_at:
            raise ConnectionError
        self.rows.append((step, *values))

    def image(self, step, name, content):
        self.others.append((step, name))

    video = table = text = image

    def flush(self):
        pass


@pytest.fixture
def follow(run):
    """Follow the run until it has ended; returns what was logged."""

    def follow(start_step, sink, **settings):
        memory = Memory(Job("wandb", settings, str(run.folder), "arm", start_step))
        memory.save(settings)
        follower = Follower(run.folder, memory, sink)
        try:
            follower.begin()
            while follower.follow(ended=True):
                pass
        finally:
            memory._lock.close()
        return memory

    return follow


def test_a_resumed_run_logs_every_row_once(run, follow):
    """Also the validation of the step at which the run was killed, and files of steps before."""
    first = Recorder()
    run.step(1, 2, 3, 4)
    run.validate(4)
    run.step(5, 6)
    one = follow(0, first)
    run.cut_back(4)
    run.step(5, 6)
    run.validate(6)
    run.step(7)
    second = Recorder()
    two = follow(4, second)
    assert one.id == two.id
    rows = [(step, "loss", "lr") for step in range(1, 8)]
    assert first.rows == [*rows[:4], (4, "val_loss"), *rows[4:6]]
    assert second.rows == [(6, "val_loss"), rows[6]]
    files = ["predicted_actions", "action_errors", "tasks", "videos/0"]
    named = {"predicted_actions": "arm/predicted_actions", "action_errors": "arm/action_errors"}
    of_step = lambda step: [(step, f"sim/{named.get(name, name)}") for name in files]  # noqa: E731
    assert first.others == [(0, "config"), (0, "environment"), (0, "first_batch/sample1_base"), *of_step(4)]
    assert second.others == of_step(6)
    run.cut_back(0)
    assert follow(0, Recorder()).id != one.id  # A run that starts again is another one.


def test_a_row_that_kills_the_tracker_is_not_logged_twice(run, follow):
    run.step(1, 2, 3)
    with pytest.raises(ConnectionError):
        follow(0, Recorder(dies_at=2))
    again = Recorder()
    follow(1, again)
    assert [step for step, *_ in again.rows] == [3]


def test_rows_are_read_when_they_are_whole(run, tmp_path):
    sink, path = Recorder(), run.folder / "metrics.jsonl"
    follower = Follower(run.folder, Memory(Job("wandb", {}, str(run.folder), "arm", 0)), sink)
    assert not follower.follow()
    path.write_text('{"step": 1, "loss": 1')
    follower.follow()
    assert sink.rows == []
    with path.open("a") as file:
        file.write('.5}\nnot json\n[1]\n{"step": 2}\n')
    follower.follow()
    assert sink.rows == [(1, "loss"), (2,)]


def test_tensorboard_reads_what_was_logged_and_a_resumed_run_replaces_steps(run, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = TensorBoardConfig(dir=str(tmp_path / "events"))
    tracker = config.start(run.folder, "arm", 0)
    run.step(1, 2, 3)
    run.validate(3)
    run.step(4)
    tracker.close(None)
    run.cut_back(3)
    tracker = config.start(run.folder, "arm", 3)
    run.step(4, 5, loss=9.0)
    tracker.close(RuntimeError())
    events = EventAccumulator(config.dir, size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    events.Reload()
    assert [(one.step, round(one.value, 3)) for one in events.Scalars("loss")] == [
        (1, 1.0), (2, 0.5), (3, 0.333), (4, 9.0), (5, 9.0),
    ]  # fmt: skip
    assert np.isnan(events.Scalars("lr")[0].value)
    assert [(one.step, one.value) for one in events.Scalars("val_loss")] == [(3, 0.5)]
    assert set(events.Tags()["images"]) == {
        *("first_batch/sample1_base", "sim/arm/predicted_actions", "sim/arm/action_errors", "sim/videos/0"),
    }
    assert events.Images("sim/videos/0")[0].encoded_image_string.startswith(b"GIF89a")
    [table] = events.Tensors("sim/tasks/text_summary")
    assert b"0.5 (0.2 to 0.8)" in table.tensor_proto.string_val[0]
    assert b"seed = 7" in events.Tensors("config/text_summary")[0].tensor_proto.string_val[0]
    assert "broken.table.json is not logged" in (run.folder / "trackers" / "tensorboard.log").read_text()


@pytest.fixture
def hanging(monkeypatch):
    """Start a process that opens and then never does anything, in place of a tracker's."""
    code, real = "import time; print('{}', flush=True); time.sleep(600)", process.subprocess.Popen
    monkeypatch.setattr(process.subprocess, "Popen", lambda command, **to: real([command[0], "-c", code], **to))


def test_a_tracker_that_hangs_delays_no_step_and_is_left_at_the_end(run, hanging, monkeypatch):
    tracker = TensorBoardConfig(close_timeout=0.5).start(run.folder, "arm", 0)
    before = time.process_time()
    for step in range(10_000):
        tracker.step(step, {"loss": 1.0})
    assert time.process_time() - before < 10_000 * 50e-6  # 0.1 % of a step of 50 ms.
    with pytest.raises(UserError, match=r"had not finished 0.5 s after .*close_timeout.*rlinf track \S+/arm tensorb"):
        tracker.close(None)
    assert tracker._process.poll() == -signal.SIGKILL


def test_a_run_that_was_asked_to_stop_waits_only_for_seconds(run, hanging, monkeypatch):
    monkeypatch.setattr(process, "SECONDS_AFTER_A_SIGNAL", 0.2)
    tracker = TensorBoardConfig(close_timeout=600).start(run.folder, "arm", 0)
    tracker.close(KeyboardInterrupt())
    assert tracker._process.poll() is None
    process.stop(tracker._process)


def test_a_tracker_that_dies_is_an_error_of_the_logger_alone(run, hanging, monkeypatch):
    monkeypatch.setattr(process, "SECONDS_BETWEEN_LOOKS", 0.0)
    tracker = TensorBoardConfig().start(run.folder, "arm", 0)
    os.kill(tracker._process.pid, signal.SIGKILL)
    tracker._process.wait()
    with pytest.raises(UserError, match=r"its process ended with code -9 \(its output: \S+tensorboard.log\)"):
        tracker.step(1, {})


def test_if_the_run_dies_its_last_steps_are_logged(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = TensorBoardConfig().start(run.folder, "arm", 0)
    run.step(1, 2)
    tracker._process.stdin.close()  # What the death of a process closes.
    assert tracker._process.wait(60) == 0
    events = EventAccumulator(str(run.folder / "tensorboard"))
    events.Reload()
    assert [one.step for one in events.Scalars("loss")] == [1, 2]


def test_a_library_that_is_missing_is_named_before_the_run_starts(run, monkeypatch):
    monkeypatch.setattr("rlinf_plugins_trackers.config.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"'wandb' needs wandb.*pip install 'rlinf-plugins-trackers\[wandb\]'"):
        TRACKERS["wandb"]().start(run.folder, "arm", 0)
    monkeypatch.setattr("rlinf_plugins_trackers.config.find_spec", lambda name: name != "swanboard" or None)
    with pytest.raises(UserError, match='mode = "local" needs swanboard'):
        SwanLabConfig(mode="local").check_library()


def test_rlinf_track_logs_a_run_that_had_no_tracker(run, capsys, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run.step(1, 2)
    events = run.folder / "events"
    assert cli.main(["track", str(run.folder), "tensorboard", f"dir={events}"]) == 0
    assert "arm: logged to tensorboard" in capsys.readouterr().out
    read = EventAccumulator(str(events))
    read.Reload()
    assert [one.step for one in read.Scalars("loss")] == [1, 2]
    assert cli.main(["track", str(run.folder), "tensorboard", "colour=red"]) == 2
    assert "settings of tensorboard: colour: Extra inputs" in capsys.readouterr().err
    assert cli.main(["track", str(run.folder / "events"), "tensorboard"]) == 2
    assert "has no metrics.jsonl" in capsys.readouterr().err


def read_wandb(folder):
    """Rows and other keys of the offline files, by the reader of SwanLab's converter: wandb brings none in Python."""
    from swanlab.converter.wb.wbdatastore import WBDataStoreReader
    from wandb.proto.wandb_internal_pb2 import Record

    rows, others, ids = {}, set(), set()
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        with WBDataStoreReader() as store:
            store.open(path)
            while data := store.scan():
                record = Record.FromString(data)
                ids.add(record.run.run_id)
                items = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
                if "loss" in items:
                    rows.setdefault(record.history.step.num, []).append(float(items["loss"]))
                others |= {name.partition(".")[0] for name in items}
    assert len(ids - {""}) == 1
    return rows, others


def read_swanlab(folder):
    """Rows and other keys of the newest experiment of the local board's files."""
    newest = sorted((folder / "swanlab").glob("run-*"))[-1]
    rows, others = {}, set()
    with sqlite3.connect(folder / "swanlab" / "runs.swanlab") as board:
        names = dict(board.execute("SELECT t.id, t.name FROM tag t JOIN experiment e ON e.id = t.experiment_id"))
        sources = board.execute("SELECT name FROM tag").fetchall()
    others = {name for (name,) in sources}
    for path in newest.glob("logs/*/*.log"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        if isinstance(lines[0]["data"], float):
            rows[path.parent.name] = {line["index"]: [line["data"]] for line in lines}
    assert names
    return next(one for one in rows.values() if one.get(1) == [1.0]), others


def read_trackio(folder):
    import trackio

    [run] = trackio.Api().runs("rlinf")
    rows, others = {}, set()
    with sqlite3.connect(next((folder / "trackio").glob("*.db"))) as database:
        for step, text in database.execute("SELECT step, metrics FROM metrics ORDER BY step"):
            values = json.loads(text)
            others |= values.keys()
            if "loss" in values:
                rows.setdefault(step, []).append(values["loss"])
    assert run.name.startswith("arm-")
    return rows, others


@pytest.mark.parametrize("name", HEAVY)
def test_each_tracker_logs_offline_and_continues_its_curve(name, run, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(run.folder / "trackio"))
    table = {"wandb": {"mode": "offline"}, "swanlab": {"mode": "local"}, "trackio": {}}[name]
    config = TRACKERS[name](**table)
    tracker = config.start(run.folder, "arm", 0)
    run.step(1, 2, 3)
    run.validate(3)
    run.step(4)
    tracker.close(RuntimeError())
    run.cut_back(3)
    tracker = config.start(run.folder, "arm", 3)
    run.step(4, 5)
    tracker.close(None)
    read = {"wandb": read_wandb, "swanlab": read_swanlab, "trackio": read_trackio}[name]
    rows, others = read(Path(run.folder))
    assert {step: [round(loss, 3) for loss in losses] for step, losses in rows.items()} == {
        1: [1.0], 2: [0.5], 3: [0.333], 4: [0.25], 5: [0.2],
    }  # fmt: skip
    named = {"first_batch/sample1_base", "sim/arm/predicted_actions", "sim/videos/0", "sim/tasks", "val_loss", "config"}
    assert named <= others
