"""The table of a run's machines before its first step: what is in them, whether they agree, how they are connected.

One process of each machine reports hardware, versions, clock and how soon it sees a file that rank 0 has written; all
ranks measure an all-reduce, and the first of each machine the link to the next machine. It takes a second or two: sizes
follow from a first, small all-reduce. The table is printed once, and is in the run's folder as `machines.json`.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import socket
import statistics
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from rlinf_core.contract.process_group import ProcessGroup
from rlinf_core.contract.run import RunConfig
from rlinf_core.files import write_text
from rlinf_core.shared_files import has_text, wait_until_seen

FILE = "machines.json"
SMALL, LARGE = 2**18, 2**26
"""Elements of the first all-reduce, and at most: 1 MB and 256 MB of float32."""
SECONDS = 0.3
"""About how long the larger all-reduce and the exchange between machines may take, each."""
TOKEN = 1.0
"""Seconds to look for a new file; a network file system may hide it for a minute, which the start of a run allows."""
ROUNDS = 3
SKEW = 2.0
"""Seconds that clocks may differ without a warning."""
SLOW = 0.5
"""A link is slow below this share of the median."""
SHOWN = 16
"""Most machines that are printed; the file has all."""


@dataclass(frozen=True)
class Machine:
    """A machine of the run, as its first process sees it."""

    host: str
    ranks: int
    devices: str
    """`8 x NVIDIA H100 80GB HBM3`, or `CPU, 16 cores`."""
    driver: str
    """Version of NVIDIA's driver; empty without one."""
    versions: dict[str, str]
    """torch, and the CUDA and NCCL that it is built with."""
    folder: str
    """The run's folder, as this machine names it."""
    free_gb: float
    token_seconds: float
    """Seconds until a file that rank 0 has written was seen; infinite: never."""
    clock_seconds: float = 0.0
    """How much its clock is ahead of that of rank 0's machine; measured to some milliseconds."""
    to_next_gb_per_second: float = 0.0
    """Speed of the link to the next machine, in both directions at once; 0 for one machine."""


@dataclass(frozen=True)
class MachineTable:
    """All machines, and what their network does."""

    machines: tuple[Machine, ...]
    latency_us: float
    """Microseconds of an all-reduce of one number over all ranks."""
    all_reduce_gb_per_second: float
    """Bus bandwidth of a large all-reduce: bytes x 2 (ranks - 1) / ranks / seconds, in GB; 0 for one rank."""
    all_reduce_mb: float
    seconds: float
    """What making the table took."""

    def lines(self) -> Iterator[str]:
        """What a run prints."""
        rows = [_row(machine) for machine in self.machines[:SHOWN]]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        yield f"machines, measured in {self.seconds:.1f} s:"
        for row in rows:
            yield "  " + "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        if len(self.machines) > SHOWN:
            yield f"  and {len(self.machines) - SHOWN} more: {FILE}"
        if self.all_reduce_gb_per_second:
            yield (
                f"  all-reduce over all ranks: {self.all_reduce_gb_per_second:.3g} GB/s with {self.all_reduce_mb:.3g} "
                f"MB, {self.latency_us:,.0f} us with one number{self._slowest()}"
            )
        yield from (f"warning: {warning}" for warning in self.warnings())

    def _slowest(self) -> str:
        """The slowest link between machines."""
        if len(self.machines) == 1:
            return ""
        place = min(range(len(self.machines)), key=lambda one: self.machines[one].to_next_gb_per_second)
        slow, speeds = self._link(place), [machine.to_next_gb_per_second for machine in self.machines]
        return f"; slowest link: {slow}, {min(speeds):.3g} GB/s (median {statistics.median(speeds):.3g})"

    def _link(self, place: int) -> str:
        return f"{self.machines[place].host} -> {self.machines[(place + 1) % len(self.machines)].host}"

    def warnings(self) -> Iterator[str]:
        """What is unlike on the machines, or slow."""
        for name, values in _compared(self.machines).items():
            if len(kinds := sorted(set(values))) > 1:
                some = "; ".join(f"{kind or 'none'} on {_hosts(self.machines, values, kind)}" for kind in kinds)
                yield f"{name} differs between machines: {some}"
        if skewed := [one for one in self.machines if abs(one.clock_seconds) > SKEW]:
            clocks = ", ".join(f"{one.host} {one.clock_seconds:+.1f} s" for one in skewed[:SHOWN])
            yield f"clocks differ from that of {self.machines[0].host}: {clocks}. Times in logs cannot be compared"
        speeds = [machine.to_next_gb_per_second for machine in self.machines]
        for place, speed in enumerate(speeds):
            if len(speeds) > 2 and speed < SLOW * statistics.median(speeds):
                median = statistics.median(speeds)
                yield f"the link {self._link(place)} has {speed:.3g} GB/s, the median is {median:.3g}"


def make_table(run: RunConfig, group: ProcessGroup) -> MachineTable | None:
    """Measure, and write the table to the run's folder on rank 0; None if the run wants none.

    Called on every rank, in a run's folder that exists.
    """
    several = group.size > 1 and os.environ.get("LOCAL_WORLD_SIZE", str(group.size)) != str(group.size)
    if run.cluster.preflight == "never" or (run.cluster.preflight == "auto" and not several):
        return None
    begin = time.monotonic()
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    seen = _see_token(run, group, first=first)
    found = group.gather(_describe(run, group, seen) if first else None)
    firsts = [rank for rank, machine in enumerate(found) if machine is not None]
    clocks = _compare_clocks(group)
    latency, bandwidth, size = _measure_all_reduce(group)
    links = _measure_links(group, firsts, bandwidth)
    machines = tuple(
        Machine(**asdict(machine) | {"clock_seconds": clocks[rank], "to_next_gb_per_second": links.get(rank, 0.0)})
        for rank, machine in enumerate(found)
        if machine is not None
    )
    table = MachineTable(machines, latency, bandwidth, size, time.monotonic() - begin)
    if group.rank == 0:
        with suppress(OSError):  # The folder is checked elsewhere; without this file, a run can go on.
            write_text(run.folder / FILE, json.dumps(asdict(table), indent=1) + "\n")
    return table


def _describe(run: RunConfig, group: ProcessGroup, token_seconds: float) -> Machine:
    versions = {"torch": str(torch.__version__)}
    devices = f"CPU, {os.cpu_count()} cores"
    if group.device.type == "cuda":
        devices = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(group.device)}"
        versions |= {"CUDA": str(torch.version.cuda), "NCCL": _nccl()}
    free = math.nan
    with suppress(OSError):
        free = shutil.disk_usage(run.folder).free / 1e9
    return Machine(
        host=socket.gethostname(),
        ranks=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        devices=devices,
        driver=_driver(),
        versions=versions,
        folder=str(run.folder.absolute()),
        free_gb=free,
        token_seconds=token_seconds,
    )


def _nccl() -> str:
    version: Any = torch.cuda.nccl.version  # Untyped.
    return ".".join(map(str, version()))


def _driver() -> str:
    """Version of NVIDIA's kernel driver, from its own file: NVML may be missing in a container."""
    with suppress(OSError, IndexError):
        words = (
            Path("/proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace").splitlines()[0].split()
        )
        return next(word for word in words if word[0].isdigit() and "." in word)
    return ""


def _see_token(run: RunConfig, group: ProcessGroup, *, first: bool) -> float:
    """Seconds until this machine sees a file that rank 0 writes to the run's folder. Called on every rank."""
    name, text = group.decide(lambda: _write_token(run))
    begin, seen = time.monotonic(), math.inf
    if first and name and not wait_until_seen(lambda: has_text(run.folder / name, text), run.folder, TOKEN):
        seen = time.monotonic() - begin
    group.wait()
    if group.rank == 0 and name:
        (run.folder / name).unlink(missing_ok=True)
    return seen


def _write_token(run: RunConfig) -> tuple[str, str]:
    name, text = f".machines.{uuid.uuid4().hex}", uuid.uuid4().hex
    try:
        write_text(run.folder / name, text)
    except OSError:
        return "", ""
    return name, text


def _compare_clocks(group: ProcessGroup) -> list[float]:
    """How much each rank's clock is ahead of rank 0's, in seconds: what they show after waiting for one another."""
    offsets = []
    for _ in range(ROUNDS):
        group.wait()
        shown = group.gather(time.time())
        offsets.append([one - shown[0] for one in shown])
    return [statistics.median(of_rank) for of_rank in zip(*offsets, strict=True)]


def _measure_all_reduce(group: ProcessGroup) -> tuple[float, float, float]:
    """Latency in microseconds, bus bandwidth in GB/s, and its size in MB."""
    if group.size == 1:
        return 0.0, 0.0, 0.0
    number = torch.zeros(1, device=group.device)
    _time(group, number)  # Connects the ranks.
    latency = min(_time(group, number) for _ in range(ROUNDS))
    small = torch.zeros(SMALL, device=group.device)
    _time(group, small)
    size, seconds = SMALL, _time(group, small)
    larger = group.decide(lambda: min(LARGE, int(SMALL * SECONDS / max(seconds, 1e-6) / 2)))
    if larger > 2 * SMALL:
        size, large = larger, torch.zeros(larger, device=group.device)
        seconds = min(_time(group, large) for _ in range(2))
    factor = 2 * (group.size - 1) / group.size
    slowest = max(group.gather(seconds))
    return 1e6 * latency, 4 * size * factor / slowest / 1e9, 4 * size / 1e6


def _time(group: ProcessGroup, tensor: torch.Tensor) -> float:
    begin = time.perf_counter()
    group.sum(tensor)
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    return time.perf_counter() - begin


def _measure_links(group: ProcessGroup, firsts: list[int], bandwidth: float) -> Mapping[int, float]:
    """First rank of a machine -> GB/s to the next machine.

    All machines send to the next one at the same time. A slow link delays two machines, its ends, but all other links
    have an end that is not delayed: a link has the speed of its faster end.
    """
    if len(firsts) == 1:
        return {}
    seconds = 0.0
    size = int(max(min(bandwidth * 1e9 * SECONDS / 4, LARGE), SMALL))
    if group.rank in firsts:
        place = firsts.index(group.rank)
        following, before = firsts[(place + 1) % len(firsts)], firsts[place - 1]
        sent, received = (torch.zeros(size, device=group.device) for _ in range(2))
        for number in (1, size):  # The first connects the two.
            seconds = _exchange(sent[:number], received[:number], following, before)
    times = group.gather(seconds)
    ends = zip(firsts, [*firsts[1:], firsts[0]], strict=True)
    return {rank: 4 * size / max(min(times[rank], times[other]), 1e-9) / 1e9 for rank, other in ends}


def _exchange(sent: torch.Tensor, received: torch.Tensor, following: int, before: int) -> float:
    begin = time.perf_counter()
    works = dist.batch_isend_irecv([dist.P2POp(dist.isend, sent, following), dist.P2POp(dist.irecv, received, before)])
    for work in works:
        work.wait()
    if received.is_cuda:
        torch.cuda.synchronize(received.device)
    return time.perf_counter() - begin


def _row(machine: Machine) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    driver = f", driver {machine.driver}" if machine.driver else ""
    seen = f"after {machine.token_seconds:.2g} s" if math.isfinite(machine.token_seconds) else "never"
    return [
        machine.host,
        f"{machine.ranks} ranks",
        f"{machine.devices}{driver}",
        versions,
        f"clock {machine.clock_seconds:+.2f} s",
        f"new files seen {seen}",
        f"{machine.free_gb:,.0f} GB free",
    ]


def _compared(machines: tuple[Machine, ...]) -> dict[str, list[str]]:
    """What should be alike: name -> its value on each machine."""
    names = list(dict.fromkeys(name for machine in machines for name in machine.versions))
    compared = {name: [machine.versions.get(name, "") for machine in machines] for name in names}
    compared["the GPU driver"] = [machine.driver for machine in machines]
    compared["the set of devices"] = [machine.devices for machine in machines]
    return compared


def _hosts(machines: tuple[Machine, ...], values: list[str], value: str) -> str:
    hosts = [machine.host for machine, one in zip(machines, values, strict=True) if one == value]
    more = f" and {len(hosts) - 4} more" if len(hosts) > 4 else ""
    return ", ".join(hosts[:4]) + more
