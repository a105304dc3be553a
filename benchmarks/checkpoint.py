"""How long training stalls for a checkpoint, beside `torch.save` on rank 0 while the others wait.

    python benchmarks/checkpoint.py [--ranks 2] [--rounds 5] [--folder FOLDER] [--json]

A model of 100 million parameters in float32 on the CPU, with AdamW's moments: 12 bytes per parameter on both sides,
which take turns in one run. Ours is sharded over the ranks, fsynced and hashed, and saved both in the background and
synchronously. The peer saves as openpi's PyTorch trainer does: rank 0 holds the whole model and optimizer, calls
`torch.save` on both and renames the folder while the others wait at a barrier; nothing is fsynced. With `--ema` ours
also saves a moving average, which openpi's PyTorch port does not have.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from reporting.result_line import ResultLine

LAYERS = 12


def measure(folder: Path, rounds: int, width: int, *, ema: bool) -> None:
    """Measure on every rank; rank 0 writes `found.json` into the folder."""
    import torch
    from torch import nn
    from torch.distributed.fsdp import fully_shard

    from rlinf_core.contract.optim import OptimConfig, TrainedParameter
    from rlinf_core.training.checkpoint.manager import Checkpoints
    from rlinf_core.training.checkpoint.state import Position
    from rlinf_core.training.checkpoint.writer import CheckpointFolder, Retention
    from rlinf_core.training.distributed.processes import processes
    from rlinf_core.training.state.ema import Ema
    from rlinf_core.training.state.fsdp import ranks_mesh
    from rlinf_core.training.state.optim import Optimizer

    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.ModuleList(
            nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)) for _ in range(LAYERS)
        )

    with processes("cpu") as group:
        model = build()
        for layer in model:
            fully_shard(layer, mesh=ranks_mesh(group.device.type, group.size))
        optim = OptimConfig(lr=1e-4, min_lr=1e-5, warmup_steps=10, decay_steps=100, weight_decay=0.0)
        trained = [TrainedParameter(*named) for named in model.named_parameters()]
        optimizer = Optimizer(trained, optim, optim.lr_at, clip_grad=optim.clip_grad)
        parts = {"model": dict(model.named_parameters()), "optim": optimizer.state_dict()}
        if ema:
            parts["ema"] = dict(Ema(model, 0.99).state_dict())
        tensors = {f"{part}.{name}": tensor.detach() for part, named in parts.items() for name, tensor in named.items()}
        if group.rank == 0:
            whole = build()
            peer = torch.optim.AdamW(whole.parameters())
            for parameter in whole.parameters():
                parameter.grad = torch.zeros_like(parameter)
            peer.step()
            peer.zero_grad()

        def save_on_rank_0(step: int) -> int:
            path = folder / "rank0" / str(step % 2)
            if group.rank == 0:
                aside = path.with_name("aside")
                aside.mkdir(parents=True)
                torch.save(whole.state_dict(), aside / "model.pt")
                torch.save(peer.state_dict(), aside / "optimizer.pt")
                aside.rename(path)
            group.wait()
            return sum(file.stat().st_size for file in path.iterdir())

        def longest(action: Callable[[], object]) -> float:
            """The seconds of an action on its slowest rank, with the disk idle at the start."""
            if group.rank == 0:
                subprocess.run(["rm", "-rf", str(folder / "rank0")], check=True)
                os.sync()
            group.wait()
            begin = time.perf_counter()
            action()
            return max(group.gather(time.perf_counter() - begin))

        saving = {}
        for name, in_background in (("async", True), ("sync", False)):
            where = CheckpointFolder(folder, folder / name, Retention(1))
            saving[name] = Checkpoints(where, group, tensors, in_background=in_background)
        begin = time.perf_counter()
        for checkpoints in saving.values():  # Seconds on a busy machine; a run spends them before its first save.
            checkpoints.wait_for_memory()
        ready = max(group.gather(time.perf_counter() - begin))
        times: dict[str, list[float]] = {}
        sizes: dict[str, int] = {}
        for step in range(1, rounds + 2):
            position = Position(step=step, epoch=0, sample=0, rows=1, seed=0, layout="")
            for name, checkpoints in saving.items():
                stall = longest(lambda c=checkpoints, p=position: c.save(p))  # type: ignore[misc]
                checkpoints.wait()
                (saved,) = checkpoints.finished()
                times.setdefault(f"{name}_stall_seconds", []).append(stall)
                times.setdefault(f"{name}_write_seconds", []).append(saved.write_seconds)
                sizes[f"{name}_bytes"] = saved.bytes
            size = 0

            def alone(step: int = step) -> None:
                nonlocal size
                size = save_on_rank_0(step)

            times.setdefault("rank0_save_seconds", []).append(longest(alone))
            sizes["rank0_bytes"] = size
        if group.rank == 0:
            count = sum(parameter.numel() for parameter in whole.parameters())
            found = {"times": times, "sizes": sizes, "ready": ready, "parameters": count}
            (folder / "found.json").write_text(json.dumps(found))


def main() -> None:
    """Measure, and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2, help="processes, with gloo")
    parser.add_argument("--rounds", type=int, default=5, help="saves of each kind that count, after a first one")
    parser.add_argument("--width", type=int, default=1024, help="of the model; 1024: 100 million parameters")
    parser.add_argument("--folder", type=Path, default=None, help="where to write 5 GB; default: the temporary folder")
    parser.add_argument("--ema", action="store_true", help="ours also saves a moving average")
    parser.add_argument("--json", action="store_true", help="print one JSON object, on the last line")
    options = parser.parse_args()
    if "RANK" in os.environ:
        measure(options.folder, options.rounds, options.width, ema=options.ema)
        return
    line = ResultLine("checkpoint", wanted=options.json)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [
            f"--nproc-per-node={options.ranks}",
            __file__,
            f"--folder={folder}",
            f"--rounds={options.rounds}",
            f"--width={options.width}",
            *["--ema"] * options.ema,
        ]
        subprocess.run(command, check=True, stdout=sys.stderr, env={"OMP_NUM_THREADS": "1", **os.environ})
        raw = json.loads((Path(folder) / "found.json").read_text())
    results = {name: round(value, 4) for name, value in _medians(raw).items()}
    text = "\n".join(f"{name.replace('_', ' '):30}{value:18.4f}" for name, value in results.items())
    settings = {"ranks": options.ranks, "rounds": options.rounds, "ema": options.ema, "parameters": raw["parameters"]}
    line.write(results, text, seconds=raw["times"], settings=settings, versions={"torch": version("torch")})


def _medians(raw: dict[str, Any]) -> dict[str, float]:
    """Medians over the rounds without the first, and the ratios of each round's stalls."""
    found = {name: statistics.median(values[1:]) for name, values in raw["times"].items()}
    found["async_first_stall_seconds"] = raw["times"]["async_stall_seconds"][0]
    found["async_memory_seconds"] = raw["ready"]
    found |= raw["sizes"]
    for kind in ("async", "sync"):
        turns = zip(raw["times"][f"{kind}_stall_seconds"], raw["times"]["rank0_save_seconds"], strict=True)
        name = "stall_vs_rank0_save" if kind == "async" else "sync_stall_vs_rank0_save"
        found[name] = statistics.median(ours / theirs for ours, theirs in list(turns)[1:])
    return found


if __name__ == "__main__":
    sys.exit(main())
