"""The run's folder between launch and first step: locked, read once, and written once after `resume` has decided.

Torch-free. Besides the run's own files the folder holds `agents` (the torchrun agents that started the run) and, if
`runner.checkpoint_dir` is set, `owner`: a line that the checkpoint folder holds too. It keeps two runs of the same name
from sharing a checkpoint folder, and still matches after both folders are moved, even to another machine.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from rlinf_core.config.load import dump_config, read_toml, with_begun
from rlinf_core.contract.policy import PolicyConfig
from rlinf_core.contract.process_group import ProcessGroup
from rlinf_core.contract.run import RunConfig
from rlinf_core.errors import UserError
from rlinf_core.files import find_obstacle, lock_file, write_text, writing
from rlinf_core.process.watchdog import is_orphan, launcher
from rlinf_core.terminal import announce
from rlinf_core.training.checkpoint.state import (
    NAMES,
    STATE,
    candidates,
    find_damage,
    latest_name,
    newest_whole,
    step_name,
)
from rlinf_core.training.distributed.shared_folder import check_shared_folders
from rlinf_core.training.resume import (
    CheckpointDir,
    Flags,
    FolderState,
    Start,
    check_obstacles,
    decide_start,
    explain,
    refuse_other_owner,
)

OWNER = "owner"
"""One line: a random number, and the path of the run's folder at the time of writing."""
AGENTS = "agents"
"""One line per torchrun agent that started the run."""
ORPHANS_WAIT = 60.0
"""Seconds to wait for the lock if orphaned workers of the same job may hold it: they save before they exit."""
LOOK_AGAIN = (0.3, 0.7)
"""Seconds until a checkpoint that is missing, unreadable or damaged is looked for again: storage may be slow to show
what another machine wrote, or be away for a moment."""
ASK_AGAIN = 0.2
"""Seconds between two attempts to lock the folder."""


class RunFolder:
    """The folder of a run that is about to start. Every rank makes the same calls; rank 0 reads and writes.

    `run` is the run's config; after `start` it has what the run decided when it began (`PolicyConfig.begun`).

    A context manager: the folder stays locked until it exits.
    """

    def __init__(self, run: RunConfig, group: ProcessGroup) -> None:
        self.run, self._group = run, group
        self._agents: frozenset[str] = frozenset()
        self._locked = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._locked.close()

    def start(self, *, overwrite: bool = False, allow_change: bool = False) -> Start:
        """Lock the folder, require that all ranks see it, and decide where the run starts, the same on every rank.

        Each rank hashes its share of the checkpoint; if it is damaged, the previous one is tried.

        Raises:
            UserError: The run cannot start here; see `resume.decide_start` and `distributed.shared_folder`.
        """
        group = self._group
        self._agents = frozenset(group.gather(own_agent())) - {""}

        def lock() -> bool:
            restarted = is_restart(self.run.folder, self._agents)
            self._locked.enter_context(lock_folder(self.run, patience=ORPHANS_WAIT if restarted else 0.0))
            return restarted

        restarted = group.decide(lock)
        check_shared_folders(self.run, group)

        def first() -> tuple[Start, PolicyConfig]:
            run = with_begun(self.run, replacing=overwrite and not restarted)
            return decide_start(run, read_folder(run), Flags(overwrite, allow_change, restarted)), run.policy

        start, policy = group.decide(first)
        self.run = self.run.model_copy(update={"policy": policy})
        return verify_start(self.run, group, start, allow_change=allow_change)

    @contextmanager
    def transaction(self, start: Start) -> Iterator[None]:
        """Prepare the folder; commit once the body, which builds the trainer, succeeds; undo everything if it fails.

        Raises:
            UserError: The folder cannot be written to, or the checkpoint folder belongs to another run. A `UserError`
                from the body is raised with the changes to the config as its likely cause.
        """
        run, begun = self.run, False

        def prepare() -> None:
            nonlocal begun
            begin(run, start, self._agents)
            begun = True

        try:
            self._group.decide(prepare)
            yield
        except BaseException as error:
            if begun:  # On rank 0, whose `begin` undoes its own failures.
                roll_back(run, start)
            if isinstance(error, UserError):
                raise explain(error, start) from error
            raise
        if begun:
            commit(run, start)


def prepare_folder(run: RunConfig, *, overwrite: bool = False, restarted: bool = False) -> Start:
    """Decide where a single-process run starts and prepare its folder, without locking it."""
    start = decide_start(run, read_folder(run), Flags(overwrite=overwrite, restarted=restarted))
    if not start.finished:
        begin(run, start)
    return start


def verify_start(run: RunConfig, group: ProcessGroup, start: Start, *, allow_change: bool = False) -> Start:
    """Have every rank hash its share of the checkpoint; go back to earlier checkpoints until one is intact.

    Raises:
        UserError: No checkpoint is intact.
    """
    damaged: dict[str, str] = {}
    flags = Flags(allow_change=allow_change, restarted=True)
    while start.checkpoint is not None and not start.finished:
        mine = _find_damage(start.checkpoint, group)
        found = [why for why in group.gather(mine) if why]
        if not found:
            break
        damaged[start.checkpoint.name] = found[0]
        start = group.decide(lambda: decide_start(run, read_folder(run, damaged), flags))
    return start


def _find_damage(checkpoint: Path, group: ProcessGroup) -> str:
    """The damage of this rank's share of a checkpoint, if it is still there when read again."""
    found = find_damage(checkpoint, rank=group.rank, ranks=group.size)
    if not found:
        return ""
    time.sleep(sum(LOOK_AGAIN))
    return find_damage(checkpoint, rank=group.rank, ranks=group.size)


def read_folder(run: RunConfig, damaged: Mapping[str, str] | None = None) -> FolderState:
    """Read what is in a run's folder; writes nothing. Checkpoints are checked by `state.json` and file sizes only.

    What is missing, unreadable or damaged is looked for again, `LOOK_AGAIN`.

    Args:
        run: The run.
        damaged: Checkpoint name -> known damage.
    """
    known = damaged or {}
    state = _look(run, known)
    for wait in LOOK_AGAIN:
        if not state.error and state.damaged.keys() <= known.keys():
            break
        time.sleep(wait)
        state = _look(run, known)
    return state


def _look(run: RunConfig, damaged: Mapping[str, str]) -> FolderState:
    folder, saved, metrics = run.folder, run.folder / "config.toml", run.folder / "metrics.jsonl"
    obstacles = find_obstacle(folder), find_obstacle(run.checkpoints)
    if any(obstacles):
        return FolderState(obstacle=obstacles[0], checkpoint_dir=CheckpointDir(obstacle=obstacles[1]))
    is_empty, config, wanted, newest, error = True, None, [], None, None
    named, bad = "", dict(damaged)
    try:
        is_empty = not (folder.exists() and any(folder.iterdir()))
        config = read_toml(saved) if saved.exists() else None
        named, wanted = latest_name(folder), candidates(folder, run.checkpoints)
        newest = newest_whole(wanted, bad)
    except UserError as unreadable:
        is_empty, error = False, unreadable
    except OSError as unreadable:
        is_empty, error = False, UserError(f"{folder} cannot be read: {unreadable}. Restore it, or --overwrite it.")
    there = sorted((path.name for path in run.checkpoints.glob(NAMES)), reverse=True)
    return FolderState(
        is_empty=is_empty,
        has_config=saved.exists(),
        foreign=saved.name if saved.exists() and not _is_run(run, config, there) else "",
        config=config or {},
        has_metrics=metrics.exists() and bool(metrics.stat().st_size),
        checkpoint=newest[0] if newest else None,
        position=newest[1] if newest else None,
        pointer=_wrong_pointer(folder / "latest", named, there),
        damaged={path.name: bad[path.name] for path in wanted if path.name in bad},
        later=tuple(sorted(name for name in there if newest and name > newest[0].name)),
        error=error,
        changed_here=newest is not None and _config_before(folder, newest[1].step).exists(),
        checkpoint_dir=_read_checkpoint_dir(run, config, named, bool(there)),
    )


def _read_checkpoint_dir(
    run: RunConfig, config: Mapping[str, Any] | None, named: str, holds_checkpoints: bool
) -> CheckpointDir:
    before = None if config is None else _checkpoints_before(run, config)
    owner, wanted_here = run.checkpoints / OWNER, bool(named) and (run.checkpoints / named).exists()
    left = [] if before is None else [before / named] if named else []
    if before is not None and not holds_checkpoints:
        left += _checkpoints_in(before)
    return CheckpointDir(
        owner=_read(owner) if owner.exists() else None,
        run_owner=_read(run.folder / OWNER),
        holds_checkpoints=holds_checkpoints,
        wanted_here=wanted_here,
        is_before=before is not None and os.path.realpath(before) == os.path.realpath(run.checkpoints),
        wanted_before=any(map(os.path.exists, left)),  # Where pathlib may raise, this answers False.
        before=before,
    )


def _is_run(run: RunConfig, config: Mapping[str, Any] | None, checkpoints: Sequence[str]) -> bool:
    """Whether the folder is a run's: by its config or, if that is damaged, by its checkpoints or its environment."""
    if config is not None and all(isinstance(config.get(table), Mapping) for table in ("runner", "policy", "trainer")):
        return True
    own = [run.folder / "checkpoints" / name / STATE for name in checkpoints]
    if any(path.is_file() and path.stat().st_size for path in own):
        return True
    environment = _read(run.folder / "environment.json")
    return all(f'"{key}":' in environment for key in ("started", "ranks", "versions"))


def _wrong_pointer(pointer: Path, named: str, there: Sequence[str]) -> str:
    """What is wrong with the file `latest`, if it might have named one of the checkpoints that are there."""
    if not there or named in there or named > there[0]:  # A last one that is missing is reported as damaged.
        return ""
    return f"{pointer} names {named}, which does not exist" if named else f"{pointer} is missing or names no checkpoint"


def _checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints in a folder; none if it cannot be read."""
    try:
        return list(folder.glob(NAMES))
    except OSError:
        return []


def _checkpoints_before(run: RunConfig, config: Mapping[str, Any]) -> Path:
    """Where the run's saved config puts its checkpoints; a damaged one counts as if it did not say."""
    runner = config.get("runner")
    given = runner.get("checkpoint_dir") if isinstance(runner, Mapping) else None
    given = given if isinstance(given, str) else ""
    return run.runner.model_copy(update={"checkpoint_dir": given}).checkpoints_of(run.folder)


def check_folder(run: RunConfig) -> None:
    """Raise `UserError` if the run's folder or its checkpoint folder cannot be created or written; creates nothing."""
    check_obstacles(run, find_obstacle(run.folder), find_obstacle(run.checkpoints))


def begin(run: RunConfig, start: Start, agents: Set[str] = frozenset()) -> None:
    """Prepare the folder: move a replaced run aside, write `config.toml`, and claim the checkpoint folder.

    A config that changes what a step computes is recorded only by `commit`: the trainer may still refuse it.

    Args:
        run: The run.
        start: Where it starts.
        agents: The torchrun agents that started it.

    Raises:
        UserError: The folder cannot be written to, or the checkpoint folder belongs to another run.
    """
    way_out = "Make room there, or name another runner.output_dir"
    if start.replaced:
        with writing(run.folder, way_out):
            _move_aside(run.folder, start.replaced)
    try:
        with writing(run.folder, way_out):
            run.folder.mkdir(parents=True, exist_ok=True)
            if not start.changed:
                write_text(run.folder / "config.toml", dump_config(run))
            if start.checkpoint is not None:
                write_text(run.folder / "latest", start.checkpoint.name)
            _remember(run.folder, agents)
        _claim_checkpoints(run, start.replaced)
    except BaseException:
        roll_back(run, start)
        raise


def roll_back(run: RunConfig, start: Start) -> None:
    """Restore the run that `begin` moved aside, because its successor could not start."""
    if start.replaced:
        shutil.rmtree(run.folder, ignore_errors=True)  # It may not exist.
        start.replaced.rename(run.folder)


def commit(run: RunConfig, start: Start) -> None:
    """The run is ready to train: remove the run it replaces; record a changed config and keep the previous one."""
    if start.changed:
        config = run.folder / "config.toml"
        before = _config_before(run.folder, start.step)
        if not before.exists():  # If it exists, no step was made with the current config.
            write_text(before, config.read_text(encoding="utf-8"))
        write_text(config, dump_config(run))
    if start.replaced:
        shutil.rmtree(start.replaced)
        for left in itertools.chain(*map(run.checkpoints.glob, (NAMES, f"{NAMES}.aside*", f".{NAMES}.tmp"))):
            shutil.rmtree(left)  # With `runner.checkpoint_dir` they were not moved with the folder.


def _config_before(folder: Path, step: int) -> Path:
    """Where the config is kept that was in force until a step, if it was changed there."""
    return folder / f"config.{step_name(step)}.toml"


def _move_aside(folder: Path, aside: Path) -> None:
    started = ((folder / "latest").exists(), (folder / "metrics.jsonl").exists(), *folder.glob(f"checkpoints/{NAMES}"))
    if aside.exists() and not any(started):
        shutil.rmtree(folder)  # Left by an --overwrite that was killed; the run it replaced is still in `aside`.
        return
    if aside.exists():
        shutil.rmtree(aside)
    folder.rename(aside)


def _claim_checkpoints(run: RunConfig, replaced: Path | None) -> None:
    """Write the owner file to the checkpoint folder; a run that replaces another inherits its owner line."""
    if not run.runner.checkpoint_dir:
        return
    own, there = run.folder / OWNER, run.checkpoints / OWNER
    with writing(run.checkpoints, "Name another runner.checkpoint_dir"):
        run.checkpoints.mkdir(parents=True, exist_ok=True)
        if not own.exists():
            inherited = _read(replaced / OWNER) if replaced else ""
            write_text(own, inherited or f"{uuid.uuid4().hex} {run.folder.absolute()}\n")
        if replaced:
            write_text(replaced / OWNER, _read(own))  # `roll_back` may restore it.
        try:
            with there.open("x", encoding="utf-8") as file:
                file.write(_read(own))
        except FileExistsError:
            refuse_other_owner(run, _read(there), _read(own))


@contextmanager
def lock_folder(run: RunConfig, *, patience: float = 0.0) -> Iterator[None]:
    """Lock the run's folder against other processes, if its file system has locks. Called on rank 0.

    Args:
        run: The run.
        patience: Seconds to wait for another process that holds the lock.

    Raises:
        UserError: Another process holds it, or the output folder cannot be written to.
    """
    path = run.folder.with_name(f".{run.folder.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    except OSError as error:
        check_obstacles(run, str(error), "")
        raise
    with file:
        try:
            _lock(file, run.folder, patience)
        except BlockingIOError:
            _wait_for_orphan(file, run.folder)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\nlauncher {launcher()}\n")
        file.flush()
        yield  # The operating system releases the lock however the process ends; the file may stay.


def _lock(file: IO[str], folder: Path, patience: float) -> None:
    end = time.monotonic() + patience
    while True:
        try:
            lock_file(file, folder)
            return
        except BlockingIOError:
            if time.monotonic() >= end:
                raise
        time.sleep(ASK_AGAIN)


def _wait_for_orphan(file: IO[str], folder: Path) -> None:
    """Lock the file after its holder has ended, if that is about to, as it has lost the torchrun that started it.

    Raises:
        UserError: The holder has no reason to end, or does not end in time.
    """
    file.seek(0)
    holder, _, rest = file.read().partition("\n")
    held_by = re.fullmatch(r"process (\d+) on (.*)", holder)
    began_by = re.match(r"launcher (\d+)", rest)
    is_here = held_by is not None and held_by[2] == socket.gethostname()
    if is_here and held_by and began_by and is_orphan(int(held_by[1]), int(began_by[1])):
        announce(f"waiting for {holder}, which lost its launcher and saves before it ends")
        with suppress(BlockingIOError):
            return _lock(file, folder, ORPHANS_WAIT)
    raise UserError(
        f"{folder} is in use by {holder or 'another process'}. Wait for it, end it, or give another runner.name."
    )


def own_agent() -> str:
    """A unique name of the torchrun agent that started this process; empty if torchrun did not start it.

    torchrun restarts all processes with the same arguments when one fails or when machines join or leave, but counts
    only failures as restarts. So a start belongs to the same job if it shares at least one agent (one per machine).
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE", "")  # <a new folder for each agent>/attempt_0/0/error.json
    return f"{socket.gethostname()} {Path(file).parents[2]}" if file else ""


def is_restart(folder: Path, agents: Set[str]) -> bool:
    """Whether one of these agents has started the run in this folder before."""
    return not agents.isdisjoint(_read(folder / AGENTS).splitlines())


def _remember(folder: Path, agents: Set[str]) -> None:
    """Record who started the run; earlier agents of the same job stay recorded, as they may return."""
    if agents:
        known = set(_read(folder / AGENTS).splitlines())
        agents = agents | known if not agents.isdisjoint(known) else agents
        write_text(folder / AGENTS, "".join(f"{agent}\n" for agent in sorted(agents)))


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
