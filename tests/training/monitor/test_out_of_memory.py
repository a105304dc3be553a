"""Out-of-memory messages: the consumers, a micro batch that should fit, other settings that help."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from rlinf_core.costs.memory import States
from rlinf_core.errors import UserError
from rlinf_core.training.config import Fsdp2TrainerConfig
from rlinf_core.training.monitor.errors import Shortage, describe_shortage, explain, ways_out
from rlinf_core.training.monitor.flight_recorder import FlightRecorder

GB = 10**9
PLAIN = Fsdp2TrainerConfig(global_batch_size=64, micro_batch_size=32)
SHORT = Shortage(80 * GB, 78 * GB, States(13 * GB, 13 * GB, 26 * GB, 0), micro_batch=32, share=64)


def test_the_largest_consumers_come_first_and_a_fitting_micro_batch_is_named():
    said = describe_shortage(SHORT, PLAIN, where="rank 3, step 1, forward", ranks=1)
    assert said.startswith("rank 3, step 1, forward: out of memory, of 80.0 GB.")
    held = said.partition("Used: ")[2]
    assert held.index("optimizer state 26.0 GB") < held.index("weights 13.0 GB")
    assert "activations and gathered weights of 32 samples, at least 26.0 GB" in held
    assert "trainer.micro_batch_size = 16 should fit (now 32; same result)" in said


def test_a_micro_batch_that_fits_is_smaller_divides_the_share_and_stays_below_the_capacity():
    for peak in range(52, 120, 4):
        for micro_batch in (1, 2, 8, 32):
            shortage = replace(SHORT, peak=peak * GB, micro_batch=micro_batch)
            fitting = shortage.fitting
            assert fitting < micro_batch
            assert not fitting or 64 % fitting == 0
            a_sample = shortage.activations / micro_batch
            assert shortage.states.total + fitting * a_sample <= shortage.capacity


@pytest.mark.parametrize("change", [{"micro_batch": 1}, {"states": States(30 * GB, 30 * GB, 60 * GB, 0)}])
def test_where_no_micro_batch_fits_the_message_says_so(change):
    said = describe_shortage(replace(SHORT, **change), PLAIN, where="", ranks=1)
    assert "no smaller trainer.micro_batch_size" in said


def test_ways_out_are_those_that_are_not_taken_yet():
    taken = PLAIN.model_copy(update={"activation_checkpointing": "full", "cpu_offload": True})
    assert list(ways_out(SHORT, taken, ranks=1)) == [
        "more devices: weights, gradients and optimizer state are divided among them"
    ]
    averaged = replace(SHORT, states=States(13 * GB, 13 * GB, 26 * GB, 13 * GB))
    ways = list(ways_out(averaged, PLAIN, ranks=8))
    assert ways[:2] == ['trainer.activation_checkpointing = "selective"', 'trainer.ema_device = "cpu"']
    eager = list(ways_out(averaged, PLAIN.model_copy(update={"compile": False}), ranks=8))
    assert eager == ["trainer.compile = true", *ways]
    assert "trainer.reduce_every_micro_batch = true" in ways
    assert "trainer.num_replicas = 1" in list(ways_out(SHORT, PLAIN.model_copy(update={"num_replicas": 2}), ranks=8))


def test_an_error_of_the_device_becomes_a_mistake_that_names_rank_step_and_phase(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=80 * GB))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 79 * GB)
    recorder = FlightRecorder(tmp_path, 3, timeout=600.0)
    recorder.enter("backward", 12)
    group = SimpleNamespace(device=torch.device("cuda", 0), size=1)
    layer = torch.nn.Linear(4, 4)
    parameters = dict(layer.named_parameters())
    tensors = {f"model.{name}": parameter for name, parameter in parameters.items()}
    state = SimpleNamespace(parameters=parameters, tensors=lambda: tensors)
    explained = explain(torch.OutOfMemoryError("CUDA out of memory"), recorder, PLAIN, group, state)
    assert isinstance(explained, UserError)
    assert str(explained).startswith("rank 3, step 12, backward: out of memory, of 80.0 GB.")
    other = ValueError("something else")
    assert explain(other, recorder, PLAIN, group, state) is other
