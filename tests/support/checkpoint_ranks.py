"""Two ranks for test_checkpoint.py that save, fail to save and check files; `main` writes what they saw to a file.

The argument is a folder: `saved` gets the checkpoints, `seen.json` what rank 0 found.
"""

import errno
import json
import time
from pathlib import Path

import torch
from torch.distributed.tensor import Shard, distribute_tensor

from rlinf_core.errors import UserError
from rlinf_core.training.checkpoint import shards
from rlinf_core.training.checkpoint.load import load
from rlinf_core.training.checkpoint.manager import Checkpoints
from rlinf_core.training.checkpoint.state import Position, find_damage
from rlinf_core.training.checkpoint.writer import CheckpointFolder, Retention
from rlinf_core.training.distributed.processes import processes
from rlinf_core.training.state.fsdp import ranks_mesh


def at(step):
    return Position(step=step, epoch=0, sample=0, rows=1, seed=0, layout="")


def fail_to_write(self, data):
    raise OSError(errno.ENOSPC, "No space left on device")


def main(arguments):
    folder = Path(arguments[0]) / "saved"
    with processes("cpu") as group:
        whole = torch.arange(24.0).view(6, 4)
        tensors = {
            "w": distribute_tensor(whole, ranks_mesh(group.device.type, group.size), [Shard(0)]),
            "same": torch.ones(3),
        }
        checkpoints = Checkpoints(CheckpointFolder(folder, folder / "checkpoints", Retention(2)), group, tensors)
        for step in (1, 2):
            time.sleep(0.2 * group.rank * (step == 1))  # Ranks come to a save at different times.
            checkpoints.save(at(step))
            group.sum(torch.ones(1))  # What training sends meanwhile.
            tensors["w"].mul_(2)
        checkpoints.wait()
        write = shards.HashedFile.write
        if group.rank == 1:
            shards.HashedFile.write = fail_to_write
        checkpoints.save(at(3))
        checkpoints.wait()
        seen = {"told": [[saved.step, saved.failure] for saved in checkpoints.finished()]}
        try:
            checkpoints.save(at(4))
        except UserError as error:
            seen["end"] = str(error)
        shards.HashedFile.write = write
        seen["there"] = sorted(path.name for path in (folder / "checkpoints").iterdir())
        second = folder / "checkpoints" / "step_000000002"
        load(second, tensors, at(2))
        seen["loaded"] = tensors["w"].full_tensor().equal(2 * whole)
        group.wait()
        if group.rank == 0:
            path = next(second.glob("__1_*"))
            path.write_bytes(path.read_bytes().replace(b"w", b"v", 1))
        group.wait()
        found = group.gather(find_damage(second, rank=group.rank, ranks=group.size))
        seen["damage"] = [why for why in found if why]
        own = folder.parent / f"own_{group.rank}"  # As without a shared folder.
        own.mkdir()
        apart = Checkpoints(CheckpointFolder(own, own / "checkpoints", Retention(2)), group, tensors)
        apart.save(at(5))
        apart.wait()
        seen["apart"] = [saved.failure for saved in apart.finished()]
        seen["named"] = [path.name for path in folder.parent.glob("own_*/latest")]
        answers = group.gather(seen)
    if group.rank == 0:
        (folder.parent / "seen.json").write_text(json.dumps(answers))
    return 0
