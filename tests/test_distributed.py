"""Devices and the process group of one."""

import pytest
import torch

from rlinf_core.errors import UserError
from rlinf_core.training.distributed import device, processes, to_device


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
