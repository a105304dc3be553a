"""A run's rehearsal: what it counts, beside the plan's formulas and torch's own tracker, and mistakes that it finds."""

import json

import pytest
import torch
import torch.distributed as dist
from distributions import repository_plugins

from rlinf_core.cli import main
from rlinf_core.config.load import load_config
from rlinf_core.contract.run import TrainerConfig
from rlinf_core.errors import UserError
from rlinf_core.plan.step import plan
from rlinf_core.rehearsal.collectives import Collective, first_difference
from rlinf_core.rehearsal.compare import check, rehearse, traffic_of, uneven_of
from rlinf_core.rehearsal.fake_cuda import CUDA, Shards, fake_cuda
from rlinf_core.rehearsal.rank import RehearsalGroup, rehearse_rank
from rlinf_core.torch_names import fake_tensors, fsdp_parameters
from rlinf_plugins_openpi.model.pi0 import Pi0

QUICKSTART = "examples/quickstart.toml"
NOT_HERE = ["data.repo_id=org/not_here", "data.validation_fraction=0", "runner.val_check_interval=0"]
EAGER = ["trainer.compile=false", "trainer.device=auto"]


def loaded(*overrides, config=QUICKSTART):
    return load_config(config, [*NOT_HERE, *overrides], repository_plugins())


def gathered(nbytes, kind="all-gather", where="layers.0"):
    return Collective(kind, 8, "bfloat16", nbytes, where, of_unit=True)


@pytest.fixture(scope="module")
def planned():
    return plan(loaded(*EAGER), repository_plugins(), 2)


def on_rank(planned, rank=0):
    size = planned.trainer.micro_batch_size
    return rehearse_rank(planned.run, repository_plugins(), [planned.longest] * size, rank, 2, measure=False)


def test_torch_believes_in_a_cuda_device_and_then_no_longer():
    before = torch.cuda.Stream, torch.cuda.current_device
    with fake_cuda(5, 1024) as values:
        assert (dist.get_rank(), dist.get_world_size()) == (5, 1024)
        x = torch.ones(3, device=CUDA, requires_grad=True)
        assert x.is_cuda
        (x[1:] * 2).sum().backward()
        assert x.grad.device == CUDA
        with pytest.raises(RuntimeError, match="two different devices"):
            x + torch.ones(3)
        assert float(RehearsalGroup(5, 1024).sum(x.detach()).sum()) == 0.0
        assert sum(values.waits.values()) == 1
    assert (torch.cuda.Stream, torch.cuda.current_device) == before
    assert not dist.is_initialized()
    assert torch.ones(2).sum().item() == 2
    with fake_cuda(0, 1), pytest.raises(UserError, match="a process of its own"), fake_cuda(0, 1):
        pass


def test_integers_of_the_batch_are_known_until_something_changes_them():
    batch = {"lengths": torch.tensor([3, 4]), "mask": torch.tensor([True, False])}
    with fake_cuda(0, 2) as values:
        lengths, mask = (one.to(CUDA) for one in batch.values())
        ends = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        assert ends.tolist() == [0, 3, 7]
        assert sum(values.waits.values()) == 1  # One copy, however many numbers.
        assert (int(lengths.max()), bool(mask.any()), bool(mask.all())) == (4, True, False)
        assert sum(values.waits.values()) == 4
        view = lengths.view(2, 1)
        assert view.tolist() == [[3], [4]]
        lengths += 1
        unknown = [view, lengths, torch.randint(5, (2,), device=CUDA), torch.ones(2, device=CUDA).argsort()]
        for one in unknown:
            with pytest.raises(fake_tensors().DataDependentOutputException):
                one.tolist()


@pytest.mark.parametrize("shape", [(0, 3), (1, 3), (7, 3), (8, 3), (1152, 3)])
@pytest.mark.parametrize("ranks", [1, 2, 3, 7, 8, 1024])
def test_shards_are_those_that_torch_would_cut(shape, ranks):
    whole = torch.arange(shape[0] * shape[1]).view(shape)
    expected, shards = fsdp_parameters()._chunk_with_empty(whole, ranks, 0), Shards(whole, ranks, 0)
    assert len(shards) == len(expected) == ranks
    for ours, theirs in zip(shards, expected, strict=True):
        assert ours.shape == theirs.shape
        assert torch.equal(ours, theirs)
    assert torch.equal(shards[-1], expected[-1])
    assert shards[0].data_ptr() == expected[0].data_ptr()
    with pytest.raises(IndexError):
        shards[ranks]


@pytest.mark.timeout(900)
@pytest.mark.slow
def test_a_rehearsal_agrees_with_the_plan(capsys):
    """Bytes to the last; memory nearly, as the plan counts all gradients of a single unit at the activations' peak."""
    arguments = [QUICKSTART, *NOT_HERE, "--nodes", "2", "--gpus", "1", "--json"]
    assert main(["rehearse", *arguments]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ranks"] == [0, 1]
    assert found["difference"] is None
    assert found["bytes_over_formula"] == pytest.approx(1, abs=1e-12)
    assert found["bytes_received_a_step"] == pytest.approx(found["bytes_planned_a_step"])
    assert 0.93 < found["memory_over_plan"] <= 1.02
    assert found["persistent_bytes"] == pytest.approx(found["planned_persistent_bytes"], rel=0.03)
    assert found["host_waits"] == {}
    assert found["collectives_a_step"][1] == 5  # Two gathers, a reduction, the norm, and the step's numbers.
    assert [note for note in found["notes"] if "trainer.device" in note]


def test_a_mistake_on_the_way_is_one_message_that_names_the_line(planned, monkeypatch):
    forward = Pi0.forward

    def wrong(self, batch):
        batch = {**batch, "state": batch["state"] + torch.zeros(batch["state"].shape)}
        return forward(self, batch)

    monkeypatch.setattr(Pi0, "forward", wrong)
    with pytest.raises(
        UserError, match=r"step 1, at rehearsal/test_rehearse\.py:\d+: aten\.add.* mixes .*cpu"
    ) as raised:
        on_rank(planned)
    assert "device=x.device" in str(raised.value)
    assert not dist.is_initialized()

    def by_value(self, batch):
        return forward(self, {**batch, "more": batch["image_mask"].nonzero()})

    monkeypatch.setattr(Pi0, "forward", by_value)
    with pytest.raises(UserError, match=r"test_rehearse\.py:\d+: .*nonzero.* needs the values of a tensor"):
        on_rank(planned)


def test_ranks_that_exchange_something_else_are_named(planned, monkeypatch):
    forward = Pi0.forward

    def uneven(self, batch):
        out = forward(self, batch)
        if dist.get_rank() == 1:
            dist.all_reduce(out.weight.clone())
        return out

    monkeypatch.setattr(Pi0, "forward", uneven)
    ranks = [on_rank(planned, rank) for rank in (0, 1)]
    assert traffic_of(ranks[0].steps[-1]) == planned.traffic  # To the byte.
    found = first_difference([(one.rank, one.collectives) for one in ranks])
    assert (found.rank, found.other_rank) == (0, 1)
    assert (found.collective.kind, found.collective.where) == ("all-gather", "the root")
    assert (found.other.kind, found.other.where) == ("all-reduce", "forward")
    assert "would wait for each other forever" in str(found)


def test_the_first_difference_is_found_wherever_it_is():
    same = [gathered(8), gathered(16)]
    assert first_difference([(0, same), (4, same), (7, list(same))]) is None
    found = first_difference([(0, same), (4, same), (7, [gathered(8), gathered(24, where="layers.1")])])
    assert (found.number, found.other_rank, found.other.where) == (2, 7, "layers.1")
    found = first_difference([(0, same), (4, same[:1]), (7, [gathered(8, "reduce-scatter"), gathered(16)])])
    assert (found.number, found.other_rank) == (1, 7)
    assert "nothing more" in str(first_difference([(0, same), (4, same[:1])]))
    # Each rank sends its own part of an exchange of all with all.
    assert first_difference([(0, [gathered(8, "all-to-all")]), (1, [gathered(9, "all-to-all")])]) is None


def test_parameters_that_shards_do_not_divide_are_listed(planned):
    assert uneven_of(planned.units, 2) == ()
    three = {one.name: one for one in uneven_of(planned.units, 3)}
    rows = {p.name: p for unit in planned.units for p in unit.parameters if unit.itemsize}
    assert three.keys() == {name for name, one in rows.items() if one.shape[0] % 3}
    many = uneven_of(planned.units, 1000)
    assert [one.padding for one in many] == sorted((one.padding for one in many), reverse=True)
    for one in many:  # As torch cuts.
        chunks = torch.empty(one.rows, 1).chunk(1000)
        assert one.without == 1000 - len(chunks)
        each = rows[one.name].numel // one.rows
        assert one.padding == (1000 * len(chunks[0]) - one.rows) * each


def test_another_number_of_ranks_than_the_batch_allows_is_refused(capsys):
    assert main(["rehearse", QUICKSTART, *NOT_HERE, "--gpus", "3"]) == 2
    assert "not a multiple of 3 ranks" in capsys.readouterr().err


def test_what_cannot_be_rehearsed_is_refused():
    with pytest.raises(UserError, match=r"trainer\.cpu_offload cannot be rehearsed"):
        rehearse(loaded("trainer.cpu_offload=true"), repository_plugins(), 2)
    run = loaded()
    with pytest.raises(UserError, match=r"supports only core's trainer .* trainer\.type is 'mine'"):
        rehearse(run.model_copy(update={"trainer": TrainerConfig(type="mine")}), repository_plugins(), 2)


VARIANTS = {
    "copies": (4, ["trainer.num_replicas=2", "trainer.micro_batch_size=4"]),
    "accumulation": (2, ["trainer.micro_batch_size=4"]),
    "accumulation, reduced each time": (2, ["trainer.micro_batch_size=4", "trainer.reduce_every_micro_batch=true"]),
    "kept gathered": (2, ["trainer.reshard_after_forward=false", "trainer.micro_batch_size=8"]),
    "average on the CPU": (2, ["trainer.ema_device=cpu", "optim.ema_decay=0.99"]),
    "checkpointed": (2, ["trainer.activation_checkpointing=full"]),
    "uneven": (3, ["trainer.global_batch_size=12", "trainer.micro_batch_size=4"]),
}


@pytest.mark.timeout(900)  # Of a busy machine; 10 s of CPU time each.
@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_settings_are_planned_as_they_are_rehearsed(name):
    ranks, overrides = VARIANTS[name]
    found = rehearse(loaded("trainer.param_dtype=bf16", *overrides), repository_plugins(), ranks)
    check(found)
    assert found.bytes_over_formula == pytest.approx(1, abs=1e-12)
    assert 0.9 < found.memory_over_plan <= 1.05


@pytest.mark.timeout(900)
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_text_is_planned_as_it_is_rehearsed(dtype):
    """In float32 no kernel attends within documents: each layer asks the host where they begin."""
    pytest.importorskip("transformers")
    plugins = repository_plugins()
    found = rehearse(load_config("examples/text_sft.toml", [f"trainer.param_dtype={dtype}"], plugins), plugins, 2)
    check(found)
    assert found.bytes_over_formula == pytest.approx(1, abs=1e-12)
    assert 0.9 < found.memory_over_plan <= 1.05
    assert list(found.measured.waits.values()) == ([4] if dtype == "fp32" else [])


@pytest.mark.timeout(900)
@pytest.mark.slow
def test_a_thousand_shards_are_planned_as_they_are_rehearsed():
    size = ["trainer.global_batch_size=1024", "trainer.micro_batch_size=1", "trainer.num_replicas=1"]
    found = rehearse(loaded("trainer.param_dtype=bf16", *size), repository_plugins(), 1024)
    check(found)
    assert [one.rank for one in found.ranks] == [0, 512, 1023]
    assert found.bytes_over_formula == pytest.approx(1, abs=1e-12)
    assert any(one.without for one in found.uneven)
