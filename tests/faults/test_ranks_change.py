"""A run continues on another number of ranks as on the same number, up to rounding (contract 1)."""

import pytest
import torch
from faulty import numbers
from torch.distributed.checkpoint import load

from rlinf_core.training.checkpoint.shards import ShardReader

EARLY, STEPS = 3, 18
KEEP = "runner.keep_last=10"


def weights(folder, step):
    """[parameters + averages], all of a checkpoint, concatenated."""
    reader = ShardReader(folder / "checkpoints" / f"step_{step:09d}")
    index = reader.read_metadata().state_dict_metadata
    tensors = {name: torch.empty(of.size) for name, of in index.items() if name.startswith(("model.", "ema."))}
    assert {name.partition(".")[0] for name in tensors} == {"model", "ema"}
    load(tensors, storage_reader=reader, no_dist=True)
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


@pytest.mark.slow
def test_two_ranks_then_one_then_three(runs, left_alone):
    for ranks, steps in ((2, 5), (1, 11), (3, STEPS)):
        ended = runs.start(steps, KEEP, ranks=ranks)
        assert ended.returncode == 0, ended.stderr
    mine, others = numbers(runs.folder), numbers(left_alone(STEPS))
    assert [row["step"] for row in mine] == list(range(1, STEPS + 1))
    assert [row["loss"] for row in mine] == pytest.approx([row["loss"] for row in others], rel=1e-4)
    end, other_end = weights(runs.folder, STEPS), weights(left_alone(STEPS), STEPS)
    update = end - weights(runs.folder, EARLY)
    assert (end - other_end).norm() <= 5e-3 * update.norm()
