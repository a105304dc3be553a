"""What a server adds to a call: round trips over loopback, with messages as robots send them.

The server runs in a process of its own, as `rlinf serve` does, with the dummy π0.5 on LIBERO's columns: the time of the
call itself is subtracted, so the policy's size does not matter.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

FIRST = 20
"""Round trips that are not counted."""


def measure_overhead(requests: int) -> dict[str, Any]:
    """Milliseconds of a round trip beyond the server's own measurement of the call (`server_timing.infer_ms`).

    `processor_ms` is the processor time of both sides per request without the policy's, which does not depend on what
    else the machine does.
    """
    from rlinf_client import PolicyClient

    command = [sys.executable, str(Path(__file__).resolve().parent / "served.py")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        try:
            address = f"ws://127.0.0.1:{int(server.stdout.readline())}"
            with PolicyClient(address, wait=60) as client:
                for number in range(FIRST):
                    _round_trip(client, number)
                own, before = time.process_time(), _processor_time(server)
                taken = [_round_trip(client, number) for number in range(requests)]
                processor = time.process_time() - own + _processor_time(server) - before
        finally:
            server.stdin.close()  # It ends.
    overheads = [one - inside for one, inside, _ in taken]
    processor -= sum(making for _, _, making in taken)
    return {
        "p50": statistics.median(overheads),
        "p90": float(np.percentile(overheads, 90)),
        "p10": float(np.percentile(overheads, 10)),
        "processor_ms": processor / requests * 1e3,
        "round_trip_p50": statistics.median(one for one, _, _ in taken),
        "requests": requests,
        "bytes": sum(value.nbytes for value in _observation(0).values() if isinstance(value, np.ndarray)),
    }


def _observation(number: int) -> dict[str, Any]:
    random = np.random.default_rng(number)
    images = random.integers(0, 256, (2, 224, 224, 3), np.uint8)
    return {
        "observation/image": images[0],
        "observation/wrist_image": images[1],
        "observation/state": random.standard_normal(8, np.float32),
        "prompt": "pick up the black bowl and place it on the plate",
    }


def _round_trip(client: Any, number: int) -> tuple[float, float, float]:
    """Milliseconds of the round trip, and of the call in it; seconds of processor time to make the observation."""
    begin = time.process_time()
    seen = _observation(number)
    made = time.process_time() - begin
    start = time.perf_counter()
    reply = client.infer(seen)
    return (time.perf_counter() - start) * 1e3, reply["server_timing"]["infer_ms"], made


def _processor_time(server: Any) -> float:
    """Seconds of processor time that the server has used, without those of the policy."""
    server.stdin.write("\n")
    server.stdin.flush()
    whole, policy = map(float, server.stdout.readline().split())
    return whole - policy
