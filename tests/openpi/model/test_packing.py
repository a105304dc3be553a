"""Samples laid end to end give what a plain padded model gives, each its own whatever lies beside it."""

from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.attention.varlen
import torch.nn.functional as F
from padded_pi0 import padded_losses

from rlinf_core.training.blocks import prepare_block
from rlinf_plugins_openpi.model import gemma
from rlinf_plugins_openpi.model.attention import attend_end_to_end
from rlinf_plugins_openpi.model.dimensions import GemmaDimensions, Pi0Dimensions, VisionDimensions
from rlinf_plugins_openpi.model.packing import Packing, multiple_for, pack, rearrange
from rlinf_plugins_openpi.model.pi0 import Pi0

VLM = GemmaDimensions(width=16, depth=3, mlp_dim=24, num_heads=4, num_kv_heads=2, head_dim=8)
EXPERT = GemmaDimensions(width=12, depth=3, mlp_dim=20, num_heads=4, num_kv_heads=2, head_dim=8)
VISION = VisionDimensions(width=8, depth=2, mlp_dim=12, num_heads=2, patch_size=4, image_size=8)


def build(pi05, dtype=torch.float32):
    model = Pi0(Pi0Dimensions(pi05, 6, 3, 32, VLM, EXPERT, VISION))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.to(dtype)


def batch_of(cameras, texts, dtype=torch.float32, seed=1):
    """A batch of samples with these cameras (booleans) and prompts of these lengths, padded to the longest."""
    generator, size = torch.Generator().manual_seed(seed), len(texts)

    def normal(*shape):
        return torch.randn(size, *shape, generator=generator).to(dtype)

    return {
        "images": torch.randint(0, 256, (size, len(cameras[0]), 8, 8, 3), dtype=torch.uint8, generator=generator),
        "image_mask": torch.tensor(cameras),
        "tokens": torch.randint(0, 32, (size, max(texts) + 2), generator=generator),
        "token_mask": torch.arange(max(texts) + 2) < torch.tensor(texts)[:, None],
        "state": normal(6),
        "actions": normal(3, 6),
        "noise": normal(3, 6),
        "time": torch.rand(size, generator=generator).to(dtype),
    }


BATCHES = {
    "all there": ([[True, True]] * 2, [5, 5]),
    "all different": ([[True, False], [True, True], [False, True], [False, False]], [3, 7, 1, 4]),
    "nothing to read": ([[False, False], [True, False]], [0, 4]),
    "no images": ([[False], [False]], [2, 3]),
}


def with_packing(batch, multiple):
    masks = (batch["image_mask"], batch["token_mask"])
    return {**batch, "packing": pack(*masks, image_tokens=VISION.num_tokens, multiple=multiple)}


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


def kernel_of_cuda(query, key, value, starts, starts_of_keys, longest, longest_of_keys):
    """What `varlen_attn` computes, and what it asks of its arguments: read off torch 2.11's FlashAttention 2."""
    assert type(longest) is int
    assert longest == longest_of_keys
    assert starts.dtype == torch.int32
    assert starts.is_contiguous()
    assert starts is starts_of_keys
    assert all(rows.stride(-1) == 1 and len(rows) == int(starts[-1]) for rows in (query, key, value))
    groups, parts = query.shape[1] // key.shape[1], []
    for begin, end in pairwise(starts.tolist()):
        assert 0 <= end - begin <= longest
        q, k, v = (rows[begin:end].transpose(0, 1) for rows in (query, key, value))
        k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
        parts.append(F.scaled_dot_product_attention(q, k, v).transpose(0, 1))
    return torch.cat(parts)


@pytest.mark.parametrize("name", BATCHES)
def test_the_kernel_of_cuda_is_given_what_the_grid_is(name, monkeypatch):
    """With something simpler in its place: tests/gpu/test_packed_attention_on_cuda.py runs the kernel itself."""
    model, batch = build(pi05=True, dtype=torch.float64), batch_of(*BATCHES[name], dtype=torch.float64)
    batch = with_packing(batch, 64)
    in_the_grid = model.losses(batch)
    wanted = gradients(model, in_the_grid)
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", kernel_of_cuda)
    monkeypatch.setattr(gemma, "attend_within", lambda q, kv, _, context: attend_end_to_end(q, kv, context.packing))
    end_to_end = model.losses(batch)
    torch.testing.assert_close(end_to_end, in_the_grid, rtol=1e-10, atol=0)
    got = gradients(model, end_to_end)
    for key in wanted:
        torch.testing.assert_close(got[key], wanted[key], rtol=0, atol=1e-10 * (1 + float(wanted[key].abs().max())))


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
