"""Devices, the process group of one, and how several ranks find each other."""

import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
from torch.distributed import HashStore

from rlinf_core.errors import RunError, UserError
from rlinf_core.training.distributed.processes import device, processes, to_device
from rlinf_core.training.distributed.rendezvous import agree


@pytest.fixture
def cuda(monkeypatch):
    """A machine that says it has CUDA devices, and torchrun's account of this process."""

    def pretend(devices, local_rank=0, processes=1):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: devices > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
        monkeypatch.setenv("LOCAL_RANK", str(local_rank))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))

    return pretend


def test_each_process_takes_its_own_device(cuda):
    cuda(4, local_rank=2, processes=4)
    assert device() == torch.device("cuda", 2)


def test_the_cpu_where_it_is_wanted_or_all_there_is(cuda):
    cuda(1)
    assert device("cpu") == torch.device("cpu")
    cuda(0, processes=2)
    assert device() == torch.device("cpu")


def test_more_processes_than_devices_are_told_what_to_do(cuda):
    cuda(1, local_rank=1, processes=2)
    with pytest.raises(UserError, match=r'--nproc-per-node 1, or set trainer\.device = "cpu"'):
        device()


@pytest.fixture
def alone(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)


def test_a_mistake_in_a_decision_is_raised_where_it_was_asked_for(alone):
    def decision():
        raise UserError("no")

    with processes("cpu") as group:
        assert group.decide(lambda: 3) == 3
        with pytest.raises(UserError, match="no"):
            group.decide(decision)


def test_an_error_leaves_no_process_group_behind(alone):
    for _ in range(2):
        with pytest.raises(RuntimeError, match="inside"), processes("cpu"):
            raise RuntimeError("inside")


def test_batches_move_with_what_is_nested_in_them():
    moved = to_device({"a": torch.ones(2), "b": {"c": torch.zeros(1, dtype=torch.bool)}}, torch.device("meta"))
    assert moved["a"].device.type == moved["b"]["c"].device.type == "meta"


def start_ranks_together(store, size):
    """What a thread for each rank agrees on, by rank, once all have."""
    with ThreadPoolExecutor(size) as threads:
        agreeing = [threads.submit(agree, store, rank, size, timedelta(seconds=20)) for rank in range(size)]
        return [one.result() for one in agreeing]


def test_ranks_of_one_start_share_a_part_of_the_store_with_nobody_of_an_earlier_one():
    """Two ranks, then three, then one, which the launcher gives the same store each time."""
    store, seen = HashStore(), []
    for size in (2, 3, 1, 3):
        stores = start_ranks_together(store, size)
        assert not any(stores[0].check([key]) for key in seen)
        stores[0].set(f"address of {len(seen)}", "here")
        assert all(one.get(f"address of {len(seen)}") == b"here" for one in stores)
        seen.append(f"address of {len(seen)}")


def test_a_rank_that_dies_while_they_meet_does_not_spoil_the_next_start():
    store = HashStore()
    with pytest.raises(RunError, match=r"^rank 1 waited 0\.1 s for rank 0 to start$"):
        agree(store, 1, 2, timedelta(seconds=0.1))
    with pytest.raises(RunError, match=r"for ranks 1, 2, 3, 4, 5, 6, 7, 8 and 2 more to start$"):
        agree(store, 0, 11, timedelta(seconds=0.1))  # It answers the dead one, which does not confirm.
    one, other = start_ranks_together(store, 2)
    one.set("address", "here")
    assert other.get("address") == b"here"


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_an_earlier_start_has_left_behind_goes(rank):
    """It lives and waits for others when all are started again."""
    store = HashStore()
    with ThreadPoolExecutor(1) as thread:
        left = thread.submit(agree, store, rank, 3, timedelta(seconds=20))
        while not store.check(["rendezvous/starts"]) and not store.check(["rendezvous/nonce/1"]):
            time.sleep(0.01)
        stores = start_ranks_together(store, 3)
        with pytest.raises(RunError, match=rf"^rank {rank} is left over: "):
            left.result()
    stores[0].set("address", "here")
    assert stores[2].get("address") == b"here"
