"""Samples laid end to end give what a plain padded model gives, each its own whatever lies beside it."""

from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from padded_pi0 import padded_losses
from small_pi0 import VISION, batch_of, build, with_packing
from varlen_on_cpu import packed_attention

from rlinf_core.training.state.blocks import prepare_block
from rlinf_plugins_openpi.model.dimensions import GemmaDimensions, Pi0Dimensions
from rlinf_plugins_openpi.model.packing import Packing, multiple_for, pack, pack_suffix, rearrange
from rlinf_plugins_openpi.model.pi0 import Pi0

BATCHES = {
    "all there": ([[True, True]] * 2, [5, 5]),
    "all different": ([[True, False], [True, True], [False, True], [False, False]], [3, 7, 1, 4]),
    "nothing to read": ([[False, False], [True, False]], [0, 4]),
    "no images": ([[False], [False]], [2, 3]),
}


def gradients(model, losses):
    model.zero_grad()
    losses.sum().backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("pi05", [False, True], ids=["pi0", "pi05"])
@pytest.mark.parametrize(("dtype", "loss", "gradient"), [(torch.float32, 1e-6, 5e-6), (torch.float64, 1e-10, 1e-10)])
def test_packed_is_padded(name, pi05, dtype, loss, gradient):
    """Losses and all gradients; where a sample has nothing at all to read, too."""
    model, batch = build(pi05, dtype), batch_of(*BATCHES[name], dtype=dtype)
    expected = padded_losses(model, batch)
    wanted = gradients(model, expected)
    for multiple in (1, 64):
        losses = model.losses(with_packing(batch, multiple))
        torch.testing.assert_close(losses, expected, rtol=0, atol=loss * float(expected.detach().max()))
        got = gradients(model, losses)
        off = sum(float((got[key] - wanted[key]).square().sum()) for key in wanted) ** 0.5
        assert off <= gradient * sum(float(one.square().sum()) for one in wanted.values()) ** 0.5


@pytest.mark.parametrize("multiple", [1, 64])
@pytest.mark.parametrize("pi05", [False, True], ids=["pi0", "pi05"])
@pytest.mark.parametrize("name", BATCHES)
def test_the_kernel_of_cuda_is_given_what_the_grid_is(name, pi05, multiple):
    """Prefix and suffix, with something simpler in its place: tests/gpu runs the kernel itself."""
    model, batch = build(pi05, dtype=torch.float64), batch_of(*BATCHES[name], dtype=torch.float64)
    batch = with_packing(batch, multiple)
    in_the_grid = model.losses(batch)
    wanted = gradients(model, in_the_grid)
    sampled = model.sample_actions(batch, batch["noise"])
    with packed_attention(), NoMasks():
        end_to_end = model.losses(batch)
        got = gradients(model, end_to_end)
        torch.testing.assert_close(model.sample_actions(batch, batch["noise"]), sampled, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(end_to_end, in_the_grid, rtol=1e-10, atol=0)
    for key in wanted:
        torch.testing.assert_close(got[key], wanted[key], rtol=0, atol=1e-10 * (1 + float(wanted[key].abs().max())))


class NoMasks(torch.overrides.TorchFunctionMode):
    """Fails if attention is given a mask: on H100, cuDNN's backward pass with one can return NaN (pytorch #196678)."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            assert len(args) < 4
            assert (kwargs or {}).get("attn_mask") is None
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("first_alone", [False, True])
def test_keys_of_the_suffix_are_the_prefix_and_what_each_query_sees(first_alone):
    packing = Packing(**with_packing(batch_of(*BATCHES["all different"]), 16)["packing"])
    tokens, rows, size = 3, len(packing.from_grid), len(packing.lengths)
    suffix = pack_suffix(packing, tokens, first_alone=first_alone)
    starts, wanted = packing.starts.tolist(), []
    for sample, (begin, end) in enumerate(pairwise(starts[:-1])):
        prefix, own = range(begin, end), range(rows + sample * tokens, rows + (sample + 1) * tokens)
        wanted += [[*prefix, own[0]], [*prefix, *own]] if first_alone else [[*prefix, *own]]
    wanted.append([*range(starts[-2], rows)] * (1 + first_alone))
    got = [suffix.rows[begin:end].tolist() for begin, end in pairwise(suffix.key_starts.tolist())]
    assert got == wanted
    assert suffix.key_starts[-1] == len(suffix.rows)
    counts = suffix.starts.diff().tolist()
    assert counts == [*([1, tokens - 1] if first_alone else [tokens]) * size, 0]
    # The places of a row, by which its gradient is gathered, are all places where it is a key of some query.
    pool, filler = torch.arange(rows + size * tokens), len(suffix.rows) - 1
    assert torch.equal(suffix.rows[suffix.inverse], pool)
    if first_alone:
        again = suffix.again != filler
        assert torch.equal(suffix.rows[suffix.again[again]], pool[again])
        places = torch.cat((suffix.inverse, suffix.again[again]))
        assert len(places.unique()) >= len(suffix.rows) - 1
    else:
        assert suffix.again is None


def test_a_sample_does_not_depend_on_those_beside_it():
    model, batch = build(pi05=True, dtype=torch.float64), batch_of(*BATCHES["all different"], dtype=torch.float64)
    together = model.losses(batch)
    for row in range(len(together)):
        alone = {key: value[row : row + 1] for key, value in batch.items()}
        torch.testing.assert_close(model.losses(alone)[0], together[row], rtol=1e-12, atol=0)


def test_filler_is_a_64th_or_16_tokens_at_most_and_shapes_are_few():
    for tokens in (1, 569, 1024, 9104, 40_000):
        multiple = multiple_for(tokens)
        assert multiple.bit_count() == 1
        assert 16 <= multiple <= max(tokens // 64, 16)
        assert multiple == 256 or 2 * multiple > tokens // 64


@pytest.mark.parametrize("multiple", [1, 16, 256])
def test_rows_are_the_tokens_that_count(multiple):
    batch = batch_of(*BATCHES["all different"])
    packing = Packing(**with_packing(batch, multiple)["packing"])
    lengths = batch["image_mask"].sum(1) * VISION.num_tokens + batch["token_mask"].sum(1)
    assert packing.lengths.tolist() == lengths.tolist()
    assert packing.valid.sum(1).tolist() == lengths.tolist()
    total, rows = int(lengths.sum()), len(packing.positions)
    assert rows % multiple == 0
    assert total < rows <= total + multiple
    assert packing.starts.tolist() == [0, *lengths.cumsum(0).tolist(), rows]
    assert packing.images.tolist() == batch["image_mask"].flatten().nonzero().flatten().tolist()
    grid = rearrange(torch.arange(rows), packing.to_grid, packing.from_grid)
    assert torch.equal(rearrange(grid.flatten(), packing.from_grid, packing.to_grid)[:total], torch.arange(total))


def test_filler_has_a_bound():
    with pytest.raises(ValueError, match="512 at most, not 513"):
        pack(torch.ones(1, 1, dtype=torch.bool), torch.ones(1, 1, dtype=torch.bool), image_tokens=1, multiple=513)


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_warm_step_compiles_nothing_more(backend, monkeypatch):
    """Contract 14: batches of other prompts and cameras compile once more at most, for all shapes.

    Which code is compiled anew is decided before the backend: the quick one leaves out making kernels of it.
    """
    import torch._dynamo

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))

    size = Pi0Dimensions(True, 6, 3, 32, *(GemmaDimensions(8, 2, 8, 2, 1, 4) for _ in range(2)), VISION)
    model = Pi0(size)
    for unit in model.shard_units():
        if unit.block:
            prepare_block(unit.module, checkpointing="none", compiled=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.1)

    def step(cameras, texts, seed):
        model.losses(with_packing(batch_of(cameras, texts, seed=seed), 16)).sum().backward()

    both, one = [[True, True]] * 3, [[True, True], [True, False], [True, True]]
    torch._dynamo.reset()
    for seed, (cameras, texts) in enumerate([(both, [3, 5, 4]), (both, [9, 30, 20]), (one, [3, 5, 4])]):
        step(cameras, texts, seed)
    warm = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert warm > 0
    for seed, (cameras, texts) in enumerate(
        [(both, [4, 4, 2]), (one, [40, 5, 9]), (both, [15, 1, 33]), (one, [2, 2, 8])]
    ):
        step(cameras, texts, seed)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == warm
