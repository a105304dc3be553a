import numpy as np
import pytest
import torch
from toy_data import Repack, Rows, ToyPolicy

from rlinf_core.data import batch_memory
from rlinf_core.data.batch_memory import batch_tensor, shared_memory_error
from rlinf_core.data.loading.loader import build_train_loader
from rlinf_core.data.loading.mixture import Source
from rlinf_core.data.loading.sampling import Batching
from rlinf_core.data.pipeline import Pipeline
from rlinf_core.errors import UserError


class Marking(ToyPolicy):
    """Fills large tensors with the number of a batch's first row."""

    def collate(self, samples):
        batch = super().collate(samples)
        first = int(batch["index"][0])
        for name, dtype in (("large", torch.float32), ("also", torch.uint8)):
            batch[name] = batch_tensor((len(samples), 5000), dtype)
            batch[name].fill_(first)
        shared = batch_tensor((2, 3), torch.int64)
        shared.copy_(torch.tensor([[first, 1, 2], [3, 4, 5]]))
        return batch | {"parts": [shared[0], shared[:, 2]]}


def marked(workers=1, steps=40):
    return build_train_loader(
        [Source(Rows(200), Pipeline(Repack()))],
        Marking(),
        Batching(2, 2),
        (0, steps),
        num_workers=workers,
    )


def check(batch):
    first = batch["index"][0]
    assert torch.equal(batch["large"], torch.full((2, 5000), float(first)))
    assert torch.equal(batch["also"], torch.full((2, 5000), int(first), dtype=torch.uint8))
    assert [part.tolist() for part in batch["parts"]] == [[first, 1, 2], [2, 5]]


def test_memory_of_batches_is_used_again_once_they_are_gone_and_not_before():
    held, addresses = [], []
    for number, batch in enumerate(marked()):
        check(batch)
        if 10 <= number < 16:
            held.append(batch)
        if number > 20:
            addresses.append(batch["large"].data_ptr())
    for one in held:
        check(one)
    # Held ones have theirs; the rest take turns: two read ahead, one in use, one being made and some slack.
    assert len({one["large"].data_ptr() for one in held}) == len(held)
    assert len(set(addresses)) <= 6
    blocks = len(next(reversed(batch_memory._received.values())))
    assert blocks <= 3 * (len(held) + 6)


def test_a_part_of_a_batch_keeps_its_memory():
    batches = iter(marked())
    views = [next(batches)["large"][1, 7:9] for _ in range(12)]
    firsts = [one.tolist() for one in views]
    for _ in range(12):
        next(batches)
    assert [one.tolist() for one in views] == firsts
    assert len({one[0] for one in firsts}) > 1


def test_without_workers_a_batch_has_ordinary_memory():
    for with_workers, without in zip(marked(1, 4), marked(0, 4), strict=True):
        assert np.array_equal(with_workers["large"], without["large"])


class Starving(ToyPolicy):
    """Fails as torch does when /dev/shm is full."""

    def collate(self, samples):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1_2_0>: Success (0)")


def test_too_little_shared_memory_is_one_message_with_ways_out(monkeypatch):
    def refuse(size, device):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1_2_0>: Success (0)")

    ways_out = r"docker run --shm-size=16g, .* or set data\.num_workers = 0"
    loader = build_train_loader(
        [Source(Rows(8), Pipeline(Repack()))], Starving(), Batching(2, 2), (0, 1), num_workers=1
    )
    with pytest.raises(UserError, match=rf"workers are out of shared memory: /dev/shm has .*{ways_out}"):
        next(iter(loader))
    monkeypatch.setattr(torch.UntypedStorage, "_new_shared", refuse)
    with pytest.raises(UserError, match=r"a block of 8\.4 MB was needed; every worker holds several"):
        batch_memory._free_block(5_000_000)
    killed = RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that ...")
    assert "--shm-size" in str(shared_memory_error(killed))
    assert shared_memory_error(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
