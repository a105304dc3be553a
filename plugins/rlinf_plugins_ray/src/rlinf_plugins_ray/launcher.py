"""The driver: connects to a running Ray cluster, places the workers, and reports how the run ended."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from rlinf_core import RunConfig, UserError
from rlinf_plugins_ray.worker import Job, work

PASSED = re.compile(r"(RLINF|HF|NCCL|GLOO|TORCH|OMP|TP)_\w+|PYTHONPATH")
SECRET = re.compile(r"TOKEN|KEY|SECRET|PASSWORD")
"""Workers get those of the driver's variables that match the first and not the second."""


def launch(run: RunConfig, arguments: Sequence[str]) -> int:
    """Run on the Ray cluster at `RAY_ADDRESS`, or else the one of this machine; returns the exit code of the run.

    Args:
        run: The config.
        arguments: Arguments of `rlinf_core.train`.

    Raises:
        UserError: There is no cluster, or the placement does not fit it.
    """
    # Else Ray would pack the current project and install it again on every node if this process was started by uv.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    import ray
    from ray.train import FailureConfig, ScalingConfig
    from ray.train import RunConfig as RayRun
    from ray.train.torch import TorchConfig, TorchTrainer

    _connect()
    storage = run.folder.absolute().with_name(f".{run.folder.name}.ray")
    try:
        workers, gpus = place(run, cast("Any", ray).cluster_resources())
        storage.mkdir(parents=True, exist_ok=True)
        began, attempt = time.time(), uuid.uuid4().hex[:8]
        trainer = TorchTrainer(
            cast("Any", work),
            train_loop_config=dict(_job(run, arguments, storage / f"{attempt}.started")),
            torch_config=TorchConfig(backend="gloo"),  # Only agrees on a port: the run has its own process group.
            scaling_config=ScalingConfig(
                num_workers=workers,
                use_gpu=gpus,
                placement_strategy="STRICT_PACK" if run.cluster.machines == 1 else "PACK",
            ),
            run_config=RayRun(
                name=attempt,
                storage_path=str(storage),
                failure_config=FailureConfig(max_failures=run.cluster.max_restarts),
            ),
        )
        return _fit(trainer, run, began)
    finally:
        shutil.rmtree(storage, ignore_errors=True)  # Ray's own records; the run's are in its folder.
        ray.shutdown()


def describe(run: RunConfig, arguments: Sequence[str]) -> str:
    """What `launch` would ask the cluster for, in words."""
    ranks = run.cluster.ranks
    workers = f"{len(ranks)} workers" if ranks else "a worker per GPU of the cluster, or per node without GPUs"
    command = " ".join(["python -m rlinf_core.train", *arguments])
    return f"Ray Train, {workers}, up to {run.cluster.max_restarts} restarts: {command}"


def place(run: RunConfig, resources: dict[str, float]) -> tuple[int, bool]:
    """Number of workers, and whether each gets a GPU.

    Args:
        run: The config.
        resources: What the cluster has, as `ray.cluster_resources()` returns it.

    Raises:
        UserError: The placement does not fit the cluster.
    """
    cluster = run.cluster
    there = 0 if run.trainer.device == "cpu" else int(resources.get("GPU", 0))
    ranks = cluster.ranks
    if ranks is None:
        workers = there or cluster.machines
    elif ranks != tuple(range(len(ranks))):
        raise UserError(
            "cluster.component_placement selects single accelerators, but Ray chooses them: write a range from 0, "
            f'such as "0-{len(ranks) - 1}"'
        )
    else:
        workers = len(ranks)
    have = there or int(resources.get("CPU", 0))
    if workers > have:
        kind = "GPUs" if there else "CPUs"
        raise UserError(
            f"the run needs {workers} {kind}, the Ray cluster has {have}: add nodes with `ray start --address=...`, "
            "or place fewer processes with cluster.component_placement"
        )
    run.trainer.check_ranks(workers)
    micro = workers * run.trainer.micro_batch_size
    if run.trainer.global_batch_size % micro:
        raise UserError(
            f"trainer.global_batch_size = {run.trainer.global_batch_size} is not a multiple of {workers} ranks x "
            f"trainer.micro_batch_size = {run.trainer.micro_batch_size}: change one of them"
        )
    return workers, bool(there)


def _connect() -> None:
    # Ray remembers the address of a cluster that has ended, and by default tries it for more than five minutes.
    os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "1")
    import ray

    try:
        ray.init(address=os.environ.get("RAY_ADDRESS", "auto"), log_to_driver=True, logging_level=logging.WARNING)
    except ConnectionError as error:
        raise UserError(
            f'cluster.launcher = "ray": no Ray cluster can be reached ({str(error).splitlines()[0]}). Start one with '
            "`ray start --head`, or set RAY_ADDRESS"
        ) from error


def _job(run: RunConfig, arguments: Sequence[str], started: Path) -> Job:
    environment = {key: value for key, value in os.environ.items() if PASSED.fullmatch(key) and not SECRET.search(key)}
    return Job(
        arguments=list(arguments),
        folder=str(run.folder.absolute()),
        started=str(started),
        cwd=str(Path.cwd()),
        environment=environment,
        nodes=run.cluster.machines,
    )


def _fit(trainer: Any, run: RunConfig, began: float) -> int:
    """Train; the run's own record of its end counts, if it has left one."""
    from ray.train import TrainingFailedError

    try:
        result = trainer.fit()
    except TrainingFailedError as error:
        code = _recorded(run.folder / "exit.json", began)
        if code is None:
            raise UserError(f"Ray could not run the workers: {str(error).splitlines()[0]}") from error
        return code or 1
    code = _recorded(run.folder / "exit.json", began)
    # A mistake that is found before the run has its folder leaves no record there.
    return int((result.metrics or {}).get("code", 1)) if code is None else code


def _recorded(path: Path, began: float) -> int | None:
    """The exit code that the run left since it began; None if it left none."""
    try:
        if path.stat().st_mtime < began - 1:
            return None
        return int(json.loads(path.read_text(encoding="utf-8"))["code"])
    except (OSError, ValueError, TypeError, KeyError):
        return None
