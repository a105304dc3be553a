"""Train a policy: `torchrun --nproc-per-node 8 -m rlinf_core.train config.toml [key=value ...]`.

The file follows the order of a run. Every rank runs it; `python -m rlinf_core.train` starts a run with one rank.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, TextIO

from rlinf_core.errors import Exit, Interrupted
from rlinf_core.process.ending import Ending
from rlinf_core.process.start import check_launcher, prepare_process, quiet_torch
from rlinf_core.process.watchdog import enter, kill_children, watchdog
from rlinf_core.terminal import wrap

if TYPE_CHECKING:
    from rlinf_core.contract.process_group import ProcessGroup
    from rlinf_core.contract.run import RunConfig
    from rlinf_core.plugins.registry import Plugins


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    prepare_process()
    parser = argparse.ArgumentParser(prog="torchrun ... -m rlinf_core.train", description="Train a policy.")
    parser.add_argument("config", help="the run's TOML file")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="override settings of the file: runner.max_steps=100"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="remove the run of the same name and start from scratch"
    )
    parser.add_argument(
        "--allow-change", action="store_true", help="continue a run with a config or images that change its steps"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of errors that have a message")
    args = parser.parse_intermixed_args(arguments)
    options = {"overwrite": args.overwrite, "allow_change": args.allow_change}
    ending = Ending(debug=args.debug)
    with watchdog.watching(ending.leave_now, rank=ending.rank):
        code = ending.follow(lambda ending: train(ending, args.config, args.overrides, **options))
        kill_children()
        _leave_writers(code)
    return code


def _leave_writers(code: int) -> None:
    """Exit the process at once if threads of torch may still be at work.

    A normal exit of Python would destroy torch's process groups while a thread uses them, which may crash or hang: one
    that writes a checkpoint, or gloo's, which wait for a rank that was lost.
    """
    if "torch" in sys.modules:
        from rlinf_core.training.checkpoint.writer import THREAD

        lost = code == Exit.DEFECT  # Not a bug, which keeps its traceback: another rank or a machine is gone.
        if lost or any(thread.name.startswith(THREAD) for thread in threading.enumerate()):
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)


def train(
    ending: Ending, config: str, overrides: Sequence[str], *, overwrite: bool = False, allow_change: bool = False
) -> None:
    """Train the run in `config`, from the start or from its last checkpoint.

    Args:
        ending: Records the end of the run; learns its folder, step and trainer here.
        config: The run's TOML file.
        overrides: `section.key=value`, settings that override the file.
        overwrite: Replace a run of the same name and start from scratch.
        allow_change: Continue a run with a config that changes what a step computes.

    Raises:
        UserError: For everything that the user can fix.
        Interrupted: A signal ended the run early, after saving.
    """
    check_launcher()
    rank = ending.rank
    enter("loading plugins and the config", rank)
    from rlinf_core.config.load import load_config
    from rlinf_core.plugins.registry import get_plugins

    with quiet_torch("ERROR"):
        plugins = get_plugins()
        run = load_config(config, overrides, plugins)
    plugins.hook.rlinf_configure(run=run)

    watchdog.allow(run.trainer.timeout_seconds)
    enter("loading torch and joining the ranks", rank)
    from rlinf_core.contract.tables.cluster import check_world_size

    with quiet_torch("ERROR"):
        from rlinf_core.training.distributed.processes import processes
    from rlinf_core.training.distributed.machine_table import make_table
    from rlinf_core.training.distributed.same_inputs import check_same_program
    from rlinf_core.training.resume import say_finished
    from rlinf_core.training.run_folder import RunFolder

    joined = processes(run.trainer.device, timeout_seconds=run.trainer.timeout_seconds, folder=run.folder)
    with joined as group, RunFolder(run, group) as folder:
        check_world_size(run.cluster, group.size)
        check_same_program(run, plugins.owners, group)
        _report(group, (f"plugin left out: {failure}" for failure in plugins.failures), sys.stderr)
        _report(group, filter(None, [run.cluster.unused]))
        start = folder.start(overwrite=overwrite, allow_change=allow_change)
        run = folder.run
        _report(group, start.notes)
        if start.finished:
            _report(group, [say_finished(run, start)])
            ending.belongs_to(run.folder, start.step)
            return
        with folder.transaction(start):
            ending.belongs_to(run.folder, start.step)
            watchdog.folder = run.folder
            if group.rank == 0:
                record_environment(run, group, plugins)
            if table := make_table(run, group):
                _report(group, table.lines())
            trainer = ending.trainer = run.trainer.build(run, start=start, group=group, plugins=plugins)
        received = trainer.train()
    if received:
        raise Interrupted(received, trainer.step)


def _report(group: ProcessGroup, lines: Iterable[str], stream: TextIO | None = None) -> None:
    if group.rank == 0:
        for line in lines:
            with suppress(OSError, ValueError):  # A run does not end because nobody reads what it says.
                print(wrap(line, stream or sys.stdout), file=stream, flush=True)


def record_environment(run: RunConfig, group: ProcessGroup, plugins: Plugins) -> None:
    """Write `environment.json`: versions, device and commit of the run or its latest continuation."""
    import json
    import platform
    from importlib.metadata import distributions

    import torch

    from rlinf_core.files import write_text

    wanted = {"torch", "numpy", "lerobot", "av", "torchcodec", "safetensors", "pydantic", "pluggy"}
    wanted |= {owner.distribution for owner in (*plugins.owners, *(entry.owner for entry in plugins.datasets()))}
    versions = {d.name: d.version for d in distributions() if d.name in wanted}
    environment = {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "commit": _commit(),
        "ranks": group.size,
        "device": torch.cuda.get_device_name(group.device) if group.device.type == "cuda" else "cpu",
        "versions": dict(sorted(versions.items())),
    }
    write_text(run.folder / "environment.json", json.dumps(environment, indent=1) + "\n")


def _commit() -> str:
    """The git commit of the current directory; empty if there is none."""
    import shutil
    import subprocess

    if not shutil.which("git"):
        return ""
    return subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
