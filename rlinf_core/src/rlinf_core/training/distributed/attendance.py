"""Which machines have come to the rendezvous of a run, so that messages name them and count those that are missing.

torchrun's rendezvous only counts. So the launcher of each machine writes its name into the same store, again and again:
an entry that does not change any more belongs to a launcher that has ended. A second thread looks whether the store
can be reached at all: without an answer, torchrun would wait in a call that does not return.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

from rlinf_core.torch_names import PrefixStore, Store, TCPStore
from rlinf_core.training.distributed.network import answers
from rlinf_core.untrusted.text import printable

BEAT = 1.0
"""Seconds between two signs of life."""
PROBE = 5.0
"""Seconds between two looks whether the store can be reached."""
FIRST, AGAIN = 20.0, 60.0
"""Seconds until the launcher reports whom it waits for, and between two reports."""
LISTED = 8
"""Most machines that a message lists."""


class Attendance:
    """This machine's entry in the store of a rendezvous, in a thread, while the body runs.

    Args:
        host: The machine of the rendezvous.
        port: Its port.
        run: The run's name.
        address: This machine's address.
        machines: Number of machines that are expected.
        report: Called with a line that says whom this machine waits for.
        patience: Seconds without an answer from the machine of the rendezvous after which it is lost.
        lost: Called then, in a thread; must end the process.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        run: str,
        address: str,
        machines: int,
        report: Callable[[str], object],
        patience: float,
        lost: Callable[[], object],
    ) -> None:
        self._endpoint, self._run, self._machines, self._report = (host, port), run, machines, report
        self._own = {"host": socket.gethostname(), "address": address}
        self._number = 0
        """The number of this machine's entry; 0: it has none yet."""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._attend, name="attendance", daemon=True)
        self._probe = threading.Thread(target=self._watch, args=(patience, lost), name="rendezvous", daemon=True)

    def __enter__(self) -> Attendance:
        self._thread.start()
        self._probe.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(2 * BEAT)

    def _watch(self, patience: float, lost: Callable[[], object]) -> None:
        seen = False  # This machine may be the one that opens the rendezvous, a moment later.
        heard = time.monotonic()
        while not self._over.wait(PROBE):
            if answers(*self._endpoint, 0.0):
                seen, heard = True, time.monotonic()
            elif seen and time.monotonic() - heard > patience and not self._over.is_set():
                lost()
                return

    def present(self) -> str:
        """The machines that are there, for a message: `2 of 3 machines are there: node0 (10.0.0.1), ...`."""
        seen: list[str] = []
        with suppress(Exception):
            seen = _alive(self._connect(), self._number if self._thread.is_alive() else 0)
        if not seen:
            return f"the machine of the rendezvous does not answer at {self._endpoint[0]}:{self._endpoint[1]}"
        more = f" and {len(seen) - LISTED} more" if len(seen) > LISTED else ""
        verb = "is" if len(seen) == 1 else "are"
        return f"{len(seen)} of {self._machines} machines {verb} there: {', '.join(seen[:LISTED])}{more}"

    def _connect(self) -> Store:
        host, port = self._endpoint
        store = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=30))
        return PrefixStore(f"rlinf/machines/{self._run}", store)

    def _attend(self) -> None:
        with suppress(Exception):  # The store has ended: torchrun reports that.
            store = self._connect()
            self._number = store.add("count", 1)
            beat, due, complete = 0, time.monotonic() + FIRST, False
            while not self._over.is_set():
                store.set(str(self._number), json.dumps(self._own | {"beat": (beat := beat + 1)}))
                if not complete and time.monotonic() >= due:
                    complete = len({name for name, _ in _read(store).values()}) >= self._machines
                    due = time.monotonic() + AGAIN
                    if not complete:  # In a thread: others must see this machine's signs of life meanwhile.
                        threading.Thread(target=self._say_who_is_there, name="waiting", daemon=True).start()
                self._over.wait(BEAT)

    def _say_who_is_there(self) -> None:
        said = f"waiting for the other machines; {self.present()}"
        if not self._over.is_set():
            self._report(said)


def _alive(store: Store, own: int) -> list[str]:
    """The machines whose entry changes, and that of the entry `own`."""
    before = _read(store)
    time.sleep(2.5 * BEAT)
    now = _read(store)
    alive = [now[key] for key in sorted(now) if key == own or now[key] != before.get(key)]
    return list(dict.fromkeys(name for name, _ in alive))


def _read(store: Any) -> dict[int, tuple[str, int]]:
    """Number of the entry -> name of the machine, its last sign of life."""
    entries: dict[int, tuple[str, int]] = {}
    for number in range(1, store.add("count", 0) + 1):
        if store.check([str(number)]):
            entry = json.loads(store.get(str(number)))
            name = f"{printable(str(entry['host']))} ({printable(str(entry['address']))})"
            entries[number] = name, int(entry["beat"])
    return entries
