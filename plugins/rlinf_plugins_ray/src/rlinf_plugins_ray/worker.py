"""A worker of Ray Train: starts one rank of the run as a process of its own, and waits for it.

The rank is a process, not the worker itself: a run catches signals, watches itself and ends its process when it hangs,
none of which the worker of a cluster may do. Its process group is not Ray's either; that one only agrees on a port.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, TypedDict, cast

OVERWRITE = "--overwrite"
FINISHED, MISTAKE = 0, 2
"""Exit codes after which Ray must not start the workers again."""
STOP_SECONDS = 30.0
"""How long a rank has to save and end."""


class Job(TypedDict):
    """What the driver gives to all workers."""

    arguments: list[str]
    """Arguments of `rlinf_core.train`."""
    folder: str
    """The run's folder."""
    started: str
    """A file that exists once the workers have been started."""
    cwd: str
    """The driver's working directory."""
    environment: dict[str, str]
    """Variables of the driver."""
    nodes: int
    """Number of machines that the run asks for."""


def work(job: Job) -> None:
    """Run one rank to its end; called by Ray Train in every worker.

    Raises:
        RuntimeError: The rank failed, and a restart of all may help.
    """
    import ray
    from ray import train

    context = train.get_context()
    rank, size = context.get_world_rank(), context.get_world_size()
    host, port, again, nodes = _agree(job, cast("Any", ray).util.get_node_ip_address())
    if nodes != job["nodes"] and rank == 0:
        print(
            f"warning: Ray has placed the {size} processes on {nodes} machines, but cluster.num_nodes = {job['nodes']}"
        )
    arguments = [word for word in job["arguments"] if word != OVERWRITE or not again]
    variables = {
        **{"RANK": str(rank), "WORLD_SIZE": str(size)},
        **{"LOCAL_RANK": str(context.get_local_rank()), "LOCAL_WORLD_SIZE": str(context.get_local_world_size())},
        **{"MASTER_ADDR": host, "MASTER_PORT": str(port), "PYTHONUNBUFFERED": "1"},
    }
    codes = _gather(_run(arguments, Path(job["cwd"]), os.environ | job["environment"] | variables))
    # A mistake that one rank finds breaks the connections of the others, which then end as if by a fault.
    code = MISTAKE if MISTAKE in codes else next(filter(None, codes), FINISHED)
    if code not in (FINISHED, MISTAKE):
        raise RuntimeError(f"rank {codes.index(code)} ended with code {code}")
    train.report({"code": code, **_last_metrics(Path(job["folder"]))})


def _agree(job: Job, host: str) -> tuple[str, int, bool, int]:
    """Address of rank 0, a free port there, whether the run was started before, and the number of machines."""
    import torch.distributed as dist

    hosts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(hosts, host)
    box: list[Any] = [None]
    if dist.get_rank() == 0:
        started = Path(job["started"])
        again = started.exists()
        started.touch()
        with socket.socket() as free:
            free.bind((host, 0))
            box = [(host, free.getsockname()[1], again)]
    dist.broadcast_object_list(box, src=0)
    return (*box[0], len(set(hosts)))


def _gather(code: int) -> list[int]:
    """The exit codes of all ranks, once all have ended."""
    import torch.distributed as dist

    codes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(codes, code)
    return codes


def _run(arguments: list[str], cwd: Path, environment: dict[str, str]) -> int:
    """Run `rlinf_core.train`, whose output is this worker's; it ends with the worker."""
    command = [sys.executable, "-P", "-u", "-m", "rlinf_core.train", *arguments]
    process = subprocess.Popen(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    guard = _end_with(os.getpid(), process.pid)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            sys.stdout.write(line)  # Ray Train logs what is printed a second time.
            sys.stdout.flush()
        return process.wait()
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
        guard.kill()
        guard.wait()


def _end_with(worker: int, rank: int) -> subprocess.Popen[bytes]:
    """A process that asks the rank to save and end once the worker is gone, however it ended."""
    code = (
        "import os, signal, sys, time\n"
        "worker, rank = map(int, sys.argv[1:])\n"
        "while os.getppid() == worker:\n"
        "    time.sleep(0.2)\n"
        "def send(number):\n"
        "    try:\n"
        "        os.kill(rank, number)\n"
        "    except ProcessLookupError:\n"
        "        sys.exit()\n"
        "send(signal.SIGTERM)\n"
        f"time.sleep({STOP_SECONDS})\n"
        "send(signal.SIGKILL)\n"
    )
    return subprocess.Popen([sys.executable, "-S", "-c", code, str(worker), str(rank)], start_new_session=True)


def _last_metrics(folder: Path) -> dict[str, float]:
    """The last step's metrics."""
    try:
        *_, last = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        row = json.loads(last)
    except (OSError, ValueError):
        return {}
    return {key: value for key, value in row.items() if isinstance(value, int | float)}
