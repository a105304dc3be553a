"""The watchdog ends what can no longer end itself, and nothing that works or waits for others."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from rlinf_core.errors import Interrupted, RunError
from rlinf_core.process import watchdog as module
from rlinf_core.process.watchdog import Watchdog, catch_stops, stops_to_catch

pytestmark = pytest.mark.usefixtures("own_signals")
LIMIT = 0.4


class Left:
    """What the watchdog wanted to end the process with; a real one would not return."""

    def __init__(self):
        self.error, self.at = None, threading.Event()

    def __call__(self, error):
        self.error = error
        self.at.set()


@pytest.fixture
def left():
    return Left()


@pytest.fixture
def watched(left):
    dog = Watchdog()
    with dog.watching(left, rank=3):
        dog.allow(LIMIT)
        yield dog


def be_busy(seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


@pytest.fixture
def idle(monkeypatch):
    """This process counts as idle, whatever threads and children other tests have left."""
    monkeypatch.setattr(module, "work", lambda: (0.0, 0))


def test_an_idle_main_thread_hangs_and_leaves_its_stack(watched, left, tmp_path, idle):
    watched.folder = tmp_path
    watched.enter("opening the data")
    assert left.at.wait(10)
    assert isinstance(left.error, RunError)
    said = str(left.error)
    assert said.startswith("rank 3 hangs (opening the data): nothing happened for ")
    assert "trainer.timeout_seconds = 0.4" in said
    record = tmp_path / "flight" / "rank_00003.txt"
    assert str(record) in said
    assert "test_an_idle_main_thread" in record.read_text()


def test_work_is_no_hang_except_in_a_step_that_never_ends(watched, left):
    watched.enter("computing statistics")
    be_busy(2 * LIMIT)
    assert left.error is None
    watched.enter("forward", 1)  # May compile.
    be_busy(2 * LIMIT)
    assert left.error is None
    watched.enter("forward", 2)
    until = time.monotonic() + 50 * LIMIT
    while left.error is None and time.monotonic() < until:
        be_busy(LIMIT / 4)
    assert "step 2, forward" in str(left.error)


def test_the_work_of_children_counts(watched, left, monkeypatch):
    child = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        monkeypatch.setattr(module, "_descendants", lambda: iter([child.pid]))
        monkeypatch.setattr(module.time, "process_time", module.time.thread_time)
        watched.enter("reading")
        assert not left.at.wait(4 * LIMIT)
        child.send_signal(signal.SIGSTOP)
        assert left.at.wait(10)
        assert f"the child process {child.pid} is stopped" in str(left.error)
    finally:
        child.kill()
        child.wait()


def test_children_of_children_are_found():
    script = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    child = subprocess.Popen([sys.executable, "-c", script])
    try:
        until = time.monotonic() + 20
        while not (found := list(module._children_of(child.pid))) and time.monotonic() < until:
            time.sleep(0.05)
        assert len(found) == 1
        assert {child.pid, *found} <= set(module._descendants())
    finally:
        for pid in (*found, child.pid):
            os.kill(pid, signal.SIGKILL)
        child.wait()


def test_who_waits_for_others_does_not_hang_until_it_works_again(watched, left, idle):
    with watched.waiting():
        assert not left.at.wait(3 * LIMIT)
        with watched.waiting(False):
            assert left.at.wait(10)


def test_a_save_that_makes_no_progress_hangs(watched, left):
    over = threading.Event()

    def save():
        with watched.thread("saving step 4"):
            for _ in range(15):  # Longer than a save may stand still.
                time.sleep(LIMIT / 4)
                watched.progress()
            assert left.error is None
            over.wait(10)

    thread = threading.Thread(target=save)
    with watched.waiting():
        thread.start()
        assert left.at.wait(20)
        over.set()
        thread.join()
    assert "rank 3 hangs (saving step 4)" in str(left.error)


def test_a_signal_to_a_thread_that_does_not_return_ends_the_process_in_time(left, monkeypatch):
    monkeypatch.setattr(module, "GRACE", 0.3)
    with Watchdog().watching(left):
        catch_stops(lambda *_: None)
        sender = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGUSR1))
        sender.start()
        threading.Thread(target=left.at.wait).start()
        time.sleep(0.6)
    assert isinstance(left.error, Interrupted)
    assert left.error.received == signal.SIGUSR1


def test_what_is_ignored_or_taken_stays_so():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # As `nohup` does.
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # As a shell does for what it starts in the background.
    signal.signal(signal.SIGUSR2, lambda *_: None)
    assert set(module.STOPPING) - set(stops_to_catch()) == {signal.SIGHUP, signal.SIGUSR2}
    catch_stops(print)
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    assert signal.getsignal(signal.SIGTERM) is print
    assert signal.getsignal(signal.SIGINT) is print
    assert signal.SIGTERM in stops_to_catch()


class Store(dict):
    """A store of one process."""

    set, get = dict.__setitem__, dict.__getitem__

    def check(self, keys):
        return all(key in self for key in keys)


def test_a_neighbour_that_falls_silent_is_named(watched, left):
    store = Store({"alive/1": b"5"})
    store.set = lambda key, value: store.update({key: value.encode()})
    with watched.waiting():
        watched.listen(store, 2, 4)
        assert left.at.wait(10)
    assert "rank 1 has given no sign of life for" in str(left.error)
    assert int(store["alive/2"]) > 3


def test_who_hangs_because_a_neighbour_is_silent_names_it(watched, left, idle, monkeypatch):
    monkeypatch.setattr(
        module, "IDLE", 1.1
    )  # The main thread counts as hanging first; it began to wait a little later.
    watched._other, watched._heard_at = 1, time.monotonic()
    time.sleep(LIMIT / 10)
    watched.enter("preparing the first step")
    assert left.at.wait(10)
    assert "rank 1 has given no sign of life for" in str(left.error)


def test_a_lost_store_is_not_a_silent_neighbour(watched, left):
    with watched.waiting():
        watched.listen(None, 2, 4)
        assert not left.at.wait(3 * LIMIT)


ORPHAN = """
import os, signal, subprocess, sys, time
from rlinf_core.process.watchdog import catch_stops, watchdog
if sys.argv[1:] == ["launcher"]:
    subprocess.Popen([sys.executable, __file__])
    time.sleep(60)
caught = []
catch_stops(lambda number, _: caught.append(number))
with watchdog.watching(print):
    print("ready", flush=True)
    while not caught:
        time.sleep(0.05)
print(signal.Signals(caught[0]).name, flush=True)
"""


def test_a_process_whose_launcher_is_gone_is_asked_to_stop(tmp_path):
    script = tmp_path / "orphan.py"
    script.write_text(ORPHAN)
    launcher = subprocess.Popen(
        [sys.executable, script, "launcher"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"TORCHELASTIC_RUN_ID": "1"},
    )
    assert launcher.stdout.readline() == "ready\n"
    launcher.kill()
    out, said = launcher.communicate(timeout=30)
    assert out == "SIGTERM\n"
    assert "the process that started this one is gone" in said
