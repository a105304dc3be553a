"""Start a run's processes on this machine with torchrun, wait for them, and report how the run ended.

torchrun runs inside this process, so that its own report of thirty lines does not bury the run's one message. Every
worker has its own session: Ctrl-C and SIGTERM reach it once, through torchrun, and it has 30 seconds to save before it
is killed.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import signal
import sys
import time
import uuid
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from rlinf_core.contract.run import RunConfig
from rlinf_core.contract.tables.cluster import ClusterConfig
from rlinf_core.data.loading.sampling import check_batch
from rlinf_core.errors import Exit, UserError
from rlinf_core.process.ending import EXIT_FILE
from rlinf_core.process.start import quiet_torch
from rlinf_core.process.watchdog import FOLDER, stops_to_catch
from rlinf_core.terminal import announce
from rlinf_core.training.distributed.network import answers, is_here, place_towards
from rlinf_core.training.distributed.open_files import allow_open_files, count_open_files
from rlinf_core.training.run_folder import check_folder

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from rlinf_core.training.distributed.attendance import Attendance

PATIENT = 10.0
"""Seconds after which a machine reports that it waits for the one of the rendezvous."""


@dataclass(frozen=True)
class Share:
    """The part of a run on this machine."""

    processes: int
    devices: tuple[int, ...] = ()
    """The accelerators to use, by their index on this machine; empty: all."""


def share_of_machine(cluster: ClusterConfig, devices: int) -> Share:
    """The part of the placement on each machine, which torchrun requires to be the same on all.

    Args:
        cluster: The `[cluster]` table.
        devices: Number of accelerators per machine; 0: train on the CPU.

    Raises:
        UserError: The placement names an accelerator that does not exist, or differs between machines.
    """
    ranks, nodes = cluster.ranks, cluster.machines
    placement = cluster.placement_setting
    if ranks is None:
        return Share(devices or 1)
    if not devices:
        if ranks != tuple(range(len(ranks))) or len(ranks) % nodes:
            machines = f", a multiple of the {nodes} machines" if nodes > 1 else ""
            raise UserError(
                f"{placement}: this machine has no accelerators to choose from; on the CPU the ranks only count "
                f'processes{machines}, from 0: "0-{max(len(ranks), nodes) // nodes * nodes - 1}"'
            )
        return Share(len(ranks) // nodes)
    if ranks[-1] >= devices * nodes:
        there = f"0-{devices * nodes - 1}" if devices * nodes > 1 else "0"
        raise UserError(
            f"{placement} names accelerator {ranks[-1]}, but {nodes} x {devices} are there ({there}): "
            'write these, or "all"'
        )
    on_machine: dict[int, list[int]] = defaultdict(list)
    for rank in ranks:
        on_machine[rank // devices].append(rank % devices)
    if len({tuple(on_machine[node]) for node in range(nodes)}) > 1:
        parts = "; ".join(f"machine {node}: {on_machine[node] or 'none'}" for node in range(nodes))
        raise UserError(
            f"{placement} means different accelerators on different machines, which torchrun cannot start "
            f"({devices} per machine; {parts}): use the same on each"
        )
    here = tuple(on_machine[0])
    return Share(len(here), here if len(here) < devices else ())


def visible_devices(devices: Sequence[int], environment: Mapping[str, str]) -> str:
    """`CUDA_VISIBLE_DEVICES` for some of the accelerators that this process sees, relative to its current value."""
    named = [name for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return ",".join(named[device].strip() if named else str(device) for device in devices)


def describe_launch(run: RunConfig, arguments: Sequence[str]) -> str:
    """The command that starts the run's processes on this machine as `launch` does, for a shell.

    Args:
        run: The config.
        arguments: Arguments of `rlinf_core.train`.

    Raises:
        UserError: The placement or the batch does not fit.
    """
    import torch

    cluster = run.cluster
    share = share_of_machine(cluster, 0 if run.trainer.device == "cpu" else torch.cuda.device_count())
    check_batch(run.trainer.global_batch_size, run.trainer.micro_batch_size, share.processes * cluster.machines)
    words = [f"CUDA_VISIBLE_DEVICES={visible_devices(share.devices, os.environ)}"] if share.devices else []
    words += ["torchrun", "--nproc-per-node", str(share.processes)]
    if cluster.machines == 1:
        words.append("--standalone")
    else:
        words += ["--nnodes", str(cluster.machines), "--rdzv-backend", "c10d", "--rdzv-id", run.runner.name]
        words += ["--rdzv-endpoint", cluster.rdzv_endpoint]
        host = cluster.rdzv_endpoint.rpartition(":")[0].strip("[]")
        words += ["--rdzv-conf", f"is_host={int(is_here(host))},join_timeout={cluster.join_timeout_seconds}"]
        words += ["--local-addr", place.address] if (place := place_towards(host)) else []
    if cluster.max_restarts:
        words += ["--max-restarts", str(cluster.max_restarts)]
    return shlex.join([*words, "-m", "rlinf_core.train", *arguments])


def launch(run: RunConfig, arguments: Sequence[str]) -> int:
    """Start the run's processes on this machine and wait for them; returns the exit code of the run.

    Args:
        run: The config.
        arguments: Arguments of `rlinf_core.train`.

    Raises:
        UserError: The placement does not fit this machine, the batch cannot be divided among the processes, the run's
            folder cannot be written to, or the rendezvous of the machines failed.
    """
    with quiet_torch("FATAL"):  # This module reports what failed.
        import torch
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError, RendezvousTimeoutError
    from torch.distributed.launcher.api import elastic_launch

    from rlinf_core.torch_names import DistError

    share = share_of_machine(run.cluster, 0 if run.trainer.device == "cpu" else torch.cuda.device_count())
    check_batch(run.trainer.global_batch_size, run.trainer.micro_batch_size, share.processes * run.cluster.machines)
    check_folder(run)
    # The machine of the rendezvous has the store's connections to all ranks and agents.
    ranks = share.processes * run.cluster.machines
    allow_open_files(count_open_files(ranks), ranks)
    if share.devices:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible_devices(share.devices, os.environ)
    if share.processes > 1:
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # As torchrun does.
    if run.cluster.machines > 1 and run.cluster.max_restarts:
        # torch 2.11's agents share the store of the first rendezvous, whose address a returning machine does not learn.
        os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    meeting = _find_rendezvous(run)
    _quieten()
    # That of an earlier process, which must not be mistaken for this one's.
    (run.folder / EXIT_FILE).unlink(missing_ok=True)
    before, started = _stamp(run.folder / EXIT_FILE), time.time()
    failed: ChildFailedError | SignalException | None = None
    try:
        with meeting.attending(run) as attendance:
            try:
                # -P: modules of the current folder are not imported by accident.
                command = ("-P", "-u", "-m", "rlinf_core.train", *arguments)
                elastic_launch(_launch_config(run, share, meeting), sys.executable)(*command)
            except RendezvousTimeoutError as error:
                raise _incomplete(run, attendance) from error
            except (RendezvousError, DistError):  # The agent could not even ask how its own processes have ended.
                return _say_lost(run)
    except (ChildFailedError, SignalException) as error:
        failed = error
    ended = _read_end(run.folder / EXIT_FILE) if _stamp(run.folder / EXIT_FILE) != before else None
    if isinstance(failed, ChildFailedError):
        return _explain(failed, ended, _records(run.folder / FOLDER, started))
    if ended is not None:
        return ended
    if failed is None:
        print(
            f"error: the run's processes ended with code 0, but rank 0 has not written {run.folder / EXIT_FILE}, as at "
            "the end of every run: other code has ended the process, such as os._exit() in a plugin. The same command "
            "continues from the last checkpoint",
            file=sys.stderr,
        )
        return Exit.DEFECT
    return Exit.INTERRUPTED if failed.sigval == signal.SIGINT else Exit.DEFECT


@dataclass(frozen=True)
class Rendezvous:
    """Where the machines of a run find one another, as this machine reaches it."""

    host: str = "localhost"
    port: int = 0
    """0: any, for one machine."""
    is_here: bool = True
    address: str | None = None
    """Where the others reach this machine; None: torchrun's default."""

    @contextmanager
    def attending(self, run: RunConfig) -> Iterator[Attendance | None]:
        """Let the other machines know that this one is there, while the body runs."""
        if run.cluster.machines == 1:
            yield None
            return
        from rlinf_core.training.distributed.attendance import Attendance

        with Attendance(
            self.host,
            self.port,
            run=run.runner.name,
            address=self.address or "address unknown",
            machines=run.cluster.machines,
            report=announce,
            # With restarts, an agent that is cut off joins the others again if it can in time.
            patience=run.trainer.timeout_seconds
            + (run.cluster.join_timeout_seconds if run.cluster.max_restarts else PATIENT),
            lost=lambda: _leave_lost(run),
        ) as attendance:
            yield attendance


def _find_rendezvous(run: RunConfig) -> Rendezvous:
    """Find out which machine this one is, and wait for that of the rendezvous.

    torchrun recognises the machine of the endpoint by names that need not be those of its addresses, and gives the
    others only a minute to find it.

    Raises:
        UserError: It does not answer within `cluster.join_timeout_seconds`.
    """
    cluster = run.cluster
    if cluster.machines == 1:
        return Rendezvous()
    host, _, port = cluster.rdzv_endpoint.rpartition(":")
    place = place_towards(host.strip("[]"))
    address = place.address if place else None
    if is_here(host.strip("[]")):
        return Rendezvous(port=int(port), address=address)
    there = Rendezvous(host, int(port), is_here=False, address=address)
    if answers(host.strip("[]"), int(port), min(PATIENT, cluster.join_timeout_seconds)):
        return there
    announce(f"waiting for the rendezvous at {cluster.rdzv_endpoint}, which rlinf launch opens on that machine")
    if answers(host.strip("[]"), int(port), cluster.join_timeout_seconds - PATIENT):
        return there
    raise UserError(
        f"cluster.rdzv_endpoint = {cluster.rdzv_endpoint!r} has not answered for {cluster.join_timeout_seconds} s "
        "(cluster.join_timeout_seconds): run the same command on that machine, and check that its name means the same "
        "here as there, and that no firewall closes the port"
    )


def _incomplete(run: RunConfig, attendance: Attendance | None) -> UserError:
    """The error for machines that have not come in time."""
    there = attendance.present() if attendance else "their launchers do not answer"
    return UserError(
        f"the {run.cluster.machines} machines have not met at cluster.rdzv_endpoint = {run.cluster.rdzv_endpoint!r} "
        f"within {run.cluster.join_timeout_seconds} s (cluster.join_timeout_seconds): {there}. Run the same command on "
        "each; a run that has begun continues from its last checkpoint"
    )


def _say_lost(run: RunConfig) -> int:
    """Report that this machine cannot reach the others any more; returns the exit code."""
    print(
        f"error: the launcher at cluster.rdzv_endpoint = {run.cluster.rdzv_endpoint!r} has ended or cannot be reached. "
        "If another machine has reported an error, that is the cause. The same command, on each machine, continues "
        "from the last checkpoint",
        file=sys.stderr,
        flush=True,
    )
    return Exit.DEFECT


def _leave_lost(run: RunConfig) -> NoReturn:
    """As `_say_lost`, while the agent waits for an answer that does not come. Its processes notice and end."""
    os._exit(_say_lost(run))


def _launch_config(run: RunConfig, share: Share, meeting: Rendezvous) -> Any:
    from torch.distributed.launcher.api import LaunchConfig

    alone = run.cluster.machines == 1
    configs: dict[str, Any] = {} if alone else {"join_timeout": run.cluster.join_timeout_seconds}
    if not meeting.is_here:
        configs["is_host"] = False
    return LaunchConfig(
        min_nodes=run.cluster.machines,
        max_nodes=run.cluster.machines,
        nproc_per_node=share.processes,
        run_id=uuid.uuid4().hex if alone else run.runner.name,
        rdzv_backend="c10d",
        rdzv_endpoint=f"{meeting.host}:{meeting.port}",
        rdzv_configs=configs,
        local_addr=meeting.address,
        max_restarts=run.cluster.max_restarts,
        signals_to_handle=",".join(signal.Signals(number).name for number in stops_to_catch()),
    )


def _quieten() -> None:
    """Silence torchrun's log unless LOGLEVEL is set: this module reports what failed."""
    if "LOGLEVEL" not in os.environ:
        logger = logging.getLogger("torch.distributed.elastic")
        logger.addHandler(logging.NullHandler())
        logger.propagate = False


def _stamp(path: Path) -> tuple[int, int] | None:
    """A value that changes whenever the file is rewritten; None if it does not exist."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_ino


def _read_end(path: Path) -> int | None:
    """The exit code in the file that a run leaves; None if there is none."""
    try:
        return int(json.loads(path.read_text(encoding="utf-8"))["code"])
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _records(folder: Path, started: float) -> str:
    """A hint at flight records written since `started`; empty if there are none."""
    try:
        newest = max((path.stat().st_mtime for path in folder.iterdir()), default=0.0)
    except FileNotFoundError:
        return ""
    return f"; {folder} says what each rank was doing before" if newest >= started else ""


def _explain(failed: ChildFailedError, ended: int | None, records: str) -> int:
    """The exit code of a run whose processes failed; reports what they could not report themselves."""
    rank, failure = failed.get_first_failure()
    code = failure.exitcode
    if code < 0:
        name = signal.Signals(-code).name
        why = ", often for lack of memory" if name == "SIGKILL" else ""
        print(
            f"error: rank {rank} (process {failure.pid}) was ended by {name}{why}{records}", file=sys.stderr, flush=True
        )
        return Exit.DEFECT
    if ended:  # 0 would come from another run, or from a restart.
        return ended
    return code if code in (Exit.USER_ERROR, Exit.INTERRUPTED) else Exit.DEFECT
