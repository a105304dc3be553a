"""Samples that lie end to end attend each to itself on a CUDA device, in one kernel that compiles once and waits never.

It needs torch and pytest alone, as test_step_on_cuda.py does: `PYTHONPATH=rlinf_core/src:rlinf_plugins_openpi/src
python -m pytest --noconftest -m gpu tests/gpu/test_packed_attention_on_cuda.py`. `RLINF_CHECK_DEVICE=cpu` tries the
test itself where there is no GPU: there the rows are spread over a grid instead.
"""

import contextlib
import os
from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from rlinf_core.training.state.blocks import prepare_block
from rlinf_plugins_openpi.model.attention import (
    KeysValues,
    Sequences,
    SuffixSequences,
    attend_jointly,
    attend_within,
    prefix_attention,
)
from rlinf_plugins_openpi.model.dimensions import GemmaDimensions, Pi0Dimensions, VisionDimensions
from rlinf_plugins_openpi.model.packing import Packing, pack, pack_suffix
from rlinf_plugins_openpi.model.pi0 import Pi0

DEVICE = torch.device(os.environ.get("RLINF_CHECK_DEVICE", "cuda"))
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE.type == "cuda" and not torch.cuda.is_available(), reason="there is no CUDA device"),
]
IMAGE_TOKENS, MULTIPLE = 256, 256
LENGTHS = {
    "alike": ([2, 2, 2, 2], [57, 57, 57, 57]),
    "different": ([3, 1, 0, 2], [85, 1, 0, 200]),  # The third sample has nothing at all to read.
    "filler alone": ([1, 1], [255, 256]),  # 255 + 256 + 512 tokens, and a whole multiple of filler.
}


def packing_of(images, texts, device):
    image_mask = torch.arange(max(images)) < torch.tensor(images)[:, None]
    token_mask = torch.arange(max(texts) + 3) < torch.tensor(texts)[:, None]
    packing = pack(image_mask, token_mask, image_tokens=IMAGE_TOKENS, multiple=MULTIPLE)
    return Packing(**{name: tensor.to(device) for name, tensor in packing.items()})


def each_sample(qkv, lengths, heads, kv_heads):
    """What is wanted, sample by sample: qkv [R, N + 2K, D] -> [tokens that count, N·D]."""
    out = []
    for rows in qkv[: sum(lengths)].split(lengths):
        q, k, v = (one.transpose(0, 1) for one in rows.split([heads, kv_heads, kv_heads], 1))
        k, v = (one.repeat_interleave(heads // kv_heads, 0) for one in (k, v))
        out.append(F.scaled_dot_product_attention(q[None], k[None], v[None])[0].transpose(0, 1).flatten(1))
    return torch.cat(out)


@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(8, 1, 256), (4, 2, 64), (4, 1, 16)])
def test_each_sample_attends_to_itself(name, heads, kv_heads, head_dim):
    """Values and gradients, to bfloat16's rounding of those in float64; (8, 1, 256) is the published size."""
    packing, lengths = packing_of(*LENGTHS[name], DEVICE), []
    lengths = [images * IMAGE_TOKENS + text for images, text in zip(*LENGTHS[name], strict=True)]
    generator = torch.Generator().manual_seed(0)
    shape = (len(packing.positions), heads + 2 * kv_heads, head_dim)
    values = torch.randn(shape, generator=generator).to(torch.bfloat16)
    weights = torch.randn(sum(lengths), heads * head_dim, generator=generator).to(torch.bfloat16)

    exact = values.double().requires_grad_()
    wanted = each_sample(exact, lengths, heads, kv_heads)
    (wanted * weights).sum().backward()

    qkv = values.to(DEVICE).requires_grad_()
    q, k, v = qkv.split([heads, kv_heads, kv_heads], 1)
    kv = KeysValues(k, v)  # Views, as the layer has them: rows lie further apart than they are long.
    attention = prefix_attention(packing, qkv)
    assert isinstance(attention, Sequences) == (DEVICE.type == "cuda")
    got = attend_within(q, kv, attention)[0][: sum(lengths)]
    (got * weights.to(DEVICE)).sum().backward()
    assert apart(got, wanted) < 0.01
    assert apart(qkv.grad[: sum(lengths)], exact.grad[: sum(lengths)]) < 0.01
    assert not qkv.grad[sum(lengths) :].any()


@pytest.mark.parametrize("low", [0, -120])
@pytest.mark.parametrize("first_alone", [False, True], ids=["pi05", "pi0"])
@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize(("heads", "head_dim", "tokens"), [(8, 256, 10), (8, 256, 16), (8, 256, 32), (4, 16, 5)])
def test_the_suffix_attends_to_prefix_and_itself(name, heads, head_dim, tokens, first_alone, low):
    """Values and gradients, to bfloat16's rounding of those in float64.

    With every logit near -120, cuDNN's backward pass of masked attention returns NaN where the number of keys leaves a
    remainder of 64 when divided by 128 (pytorch #196678).
    """
    packing = packing_of(*LENGTHS[name], DEVICE)
    rows, size = len(packing.positions), len(packing.lengths)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, head_dim, generator=generator)

    q, own = normal(size, tokens, heads), [normal(size, tokens, 1) for _ in "kv"]
    prefix = [normal(rows, 1) for _ in "kv"]
    if low:
        q, own[0], prefix[0] = 0.1 * q, 0.1 * own[0], 0.1 * prefix[0]
        q[..., 0], own[0][..., 0], prefix[0][..., 0] = 1.0, low * head_dim**0.5, low * head_dim**0.5
    values = [one.to(torch.bfloat16) for one in (q, *own, *prefix)]
    weights = torch.randn(size, tokens, heads * head_dim, generator=generator).to(torch.bfloat16)

    exact = [one.double().requires_grad_() for one in values]
    wanted = each_suffix(exact, packing.starts.tolist(), first_alone)
    (wanted * weights).sum().backward()

    given = [one.to(DEVICE).requires_grad_() for one in values]
    with packed_on_cpu():
        sequences = SuffixSequences(pack_suffix(packing, tokens, first_alone=first_alone), tokens, 2048)
        got = attend_jointly(given[0], KeysValues(*given[3:]), KeysValues(*given[1:3]), sequences)
        (got * weights.to(DEVICE)).sum().backward()
    assert apart(got, wanted) < 0.01
    real = int(packing.starts[-2])
    for one, other in zip(given, exact, strict=True):
        gradient, expected = one.grad, other.grad
        if len(one) == rows:
            assert not gradient[real:].any()
            gradient, expected = gradient[:real], expected[:real]
        assert gradient.isfinite().all()
        # The first channel makes the logits low. Its gradient is a sum of numbers that cancel, times thousands.
        first = 1 if low else 0
        assert apart(gradient[..., first:], expected[..., first:]) < 0.02


def each_suffix(tensors, starts, first_alone):
    """What is wanted, sample by sample: [B, T, N·D]."""
    out, (q, k, v, prefix_k, prefix_v) = [], tensors
    for sample, (begin, end) in enumerate(pairwise(starts[:-1])):
        keys, values = (
            torch.cat((prefix[begin:end], own[sample])).transpose(0, 1)
            for prefix, own in ((prefix_k, k), (prefix_v, v))
        )
        scores = q[sample].transpose(0, 1) @ keys.mT * q.shape[-1] ** -0.5
        if first_alone:
            hidden = torch.zeros(scores.shape[1:], dtype=torch.bool)
            hidden[0, end - begin + 1 :] = True
            scores = scores.masked_fill(hidden, -torch.inf)
        out.append((scores.softmax(-1) @ values).transpose(0, 1).flatten(1))
    return torch.stack(out)


def packed_on_cpu():
    """Where there is no GPU, a stand-in for its kernel."""
    if DEVICE.type == "cuda":
        return contextlib.nullcontext()
    from varlen_on_cpu import packed_attention

    return packed_attention()


def test_vision_attention_is_that_of_float64():
    """By whatever kernel torch chooses for the published size, without a mask."""
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(4, 256, 3, 16, 72, generator=generator).to(torch.bfloat16)
    weights = torch.randn(4, 256, 16 * 72, generator=generator).to(torch.bfloat16)
    found = []
    for given in (qkv.double(), qkv.to(DEVICE)):
        given.requires_grad_()
        q, k, v = given.transpose(1, 3).unbind(2)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        (out * weights.to(given.device)).sum().backward()
        found.append((out, given.grad))
    for got, wanted in zip(found[1], found[0], strict=True):
        assert apart(got, wanted) < 0.01


def apart(got, wanted):
    difference = got.detach().double().cpu() - wanted.detach()
    return float(difference.norm() / wanted.detach().norm())


def batch_of(images, texts, seed):
    """A batch as the loader hands it to the step: in page-locked memory, then on its way to the device."""
    generator, size = torch.Generator().manual_seed(seed), len(texts)
    masks = {
        "image_mask": torch.arange(2) < torch.tensor(images)[:, None],
        "token_mask": torch.arange(-(-max(texts) // 16) * 16) < torch.tensor(texts)[:, None],
    }
    batch = {
        **masks,
        "images": torch.randint(0, 256, (size, 2, 224, 224, 3), dtype=torch.uint8, generator=generator),
        "tokens": torch.randint(0, 32, masks["token_mask"].shape, generator=generator),
        "state": torch.randn(size, 6, generator=generator),
        "actions": torch.randn(size, 3, 6, generator=generator),
        "noise": torch.randn(size, 3, 6, generator=generator),
        "time": torch.rand(size, generator=generator),
    }
    packing = pack(*masks.values(), image_tokens=IMAGE_TOKENS, multiple=MULTIPLE)

    def there(tensor):
        return (tensor.pin_memory() if DEVICE.type == "cuda" else tensor).to(DEVICE, non_blocking=True)

    return {key: there(value) for key, value in batch.items()} | {
        "packing": {key: there(value) for key, value in packing.items()}
    }


@pytest.mark.parametrize("pi05", [False, True], ids=["pi0", "pi05"])
def test_warm_steps_compile_nothing_and_wait_for_nothing(pi05, monkeypatch):
    """Batches of other prompts and cameras, in the dtypes of a run."""
    import torch._dynamo

    if DEVICE.type != "cuda":  # Which code is compiled anew is decided before the backend.
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    gemma = GemmaDimensions(width=64, depth=2, mlp_dim=64, num_heads=4, num_kv_heads=1, head_dim=16)
    model = Pi0(Pi0Dimensions(pi05, 6, 3, 32, gemma, gemma, VisionDimensions(32, 2, 32, 2))).to(DEVICE)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    for unit in model.shard_units():
        if unit.dtype == "compute":
            unit.module.to(torch.bfloat16)
        if unit.block:
            prepare_block(unit.module, checkpointing="none", compiled=True)
    made = iter([([2, 2, 2], [3, 5, 4]), ([2, 2, 2], [9, 30, 20]), ([2, 1, 2], [3, 5, 4]), ([1, 1, 1], [90, 17, 8])])
    later = [([2, 2, 2], [4, 4, 2]), ([2, 1, 2], [40, 5, 9]), ([2, 2, 2], [15, 1, 33]), ([1, 2, 1], [2, 99, 8])]

    torch._dynamo.reset()
    for seed, kind in enumerate(made):
        model(batch_of(*kind, seed)).loss_sum.backward()
    warm, losses = graphs(), []
    assert warm > 0
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    try:
        for seed, kind in enumerate(later):
            out = model(batch_of(*kind, seed))
            out.loss_sum.backward()
            losses.append(out.loss_sum.detach())
    finally:
        if DEVICE.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert graphs() == warm
    assert torch.stack(losses).isfinite().all()


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]
