"""What `torch.compile` makes of the blocks along the CUDA path: few graphs for all batches of a run, no block eager.

Which code is compiled is decided before the backend, so a backend that only counts calls shows what a GPU would run.
"""

import random
from functools import partial

import pytest
import torch
import torch._dynamo
from torch import nn
from varlen_on_cpu import packed_attention

from rlinf_core.training.state import blocks
from rlinf_core.training.state.blocks import Compilation, prepare_block
from rlinf_plugins_openpi.model.dimensions import GemmaDimensions, Pi0Dimensions, VisionDimensions
from rlinf_plugins_openpi.model.packing import pack
from rlinf_plugins_openpi.model.pi0 import Pi0

IMAGE_TOKENS, HORIZON, SAMPLES, BATCHES = 64, 5, 4, 14
DEPTH, VISION_DEPTH = 4, 3
GEMMA = GemmaDimensions(width=32, depth=DEPTH, mlp_dim=32, num_heads=4, num_kv_heads=1, head_dim=8)
VISION = VisionDimensions(width=16, depth=VISION_DEPTH, mlp_dim=16, num_heads=2, patch_size=4, image_size=32)
DRAWN = random.Random(0)
LIKE_LIBERO = [([2] * SAMPLES, [max(1, round(DRAWN.gauss(57, 3))) for _ in range(SAMPLES)]) for _ in range(BATCHES)]
MISSING_CAMERAS = [
    ([DRAWN.randint(0, 2) for _ in range(SAMPLES)], [DRAWN.randint(1, 200) for _ in range(SAMPLES)])
    for _ in range(BATCHES)
]


def batch_of(images, texts, seed):
    """A batch of samples with this many cameras and text tokens."""
    generator, size = torch.Generator().manual_seed(seed), len(texts)
    image_mask = torch.arange(2) < torch.tensor(images)[:, None]
    token_mask = torch.arange(-(-max(texts) // 16) * 16) < torch.tensor(texts)[:, None]
    side = VISION.image_size
    return {
        "image_mask": image_mask,
        "token_mask": token_mask,
        "images": torch.randint(0, 256, (size, 2, side, side, 3), dtype=torch.uint8, generator=generator),
        "tokens": torch.randint(0, 32, token_mask.shape, generator=generator),
        "state": torch.randn(size, 6, generator=generator),
        "actions": torch.randn(size, HORIZON, 6, generator=generator),
        "noise": torch.randn(size, HORIZON, 6, generator=generator),
        "time": torch.rand(size, generator=generator),
        "packing": pack(image_mask, token_mask, image_tokens=IMAGE_TOKENS),
    }


def model_of(pi05, checkpointing, compilation):
    """A small policy in the dtypes of a run, with its blocks prepared for training."""
    model = Pi0(Pi0Dimensions(pi05, 6, HORIZON, 32, GEMMA, GEMMA, VISION))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    for unit in model.shard_units():
        if unit.dtype == "compute":
            unit.module.to(torch.bfloat16)
        if unit.block:
            prepare_block(unit.module, checkpointing=checkpointing, compiled=True, compilation=compilation)
    return model


@pytest.fixture
def calls(monkeypatch):
    """Counts the calls of compiled graphs."""
    counted = [0]

    def backend(graph, _):
        def call(*inputs):
            counted[0] += 1
            return graph.forward(*inputs)

        return call

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield counted
    torch._dynamo.reset()


CASES = {
    "pi05 on LIBERO, selective": (True, LIKE_LIBERO, "selective"),
    "pi05 on LIBERO": (True, LIKE_LIBERO, "none"),
    "pi05 on LIBERO, full": (True, LIKE_LIBERO, "full"),
    "pi0 with missing cameras": (False, MISSING_CAMERAS, "none"),
    "pi0 with missing cameras, selective": (False, MISSING_CAMERAS, "selective"),
    "pi0 with missing cameras, full": (False, MISSING_CAMERAS, "full"),
}


@pytest.mark.parametrize(
    ("pi05", "batches", "checkpointing"),
    [
        pytest.param(*case, id=name, marks=[pytest.mark.slow] * bool(number))
        for number, (name, case) in enumerate(CASES.items())
    ],
)
def test_every_block_of_every_batch_runs_compiled(calls, pi05, batches, checkpointing):
    compilation = Compilation()
    model = model_of(pi05, checkpointing, compilation)
    each, graphs = [], []
    with packed_attention():
        for seed, kind in enumerate(batches):
            calls[0] = 0
            out = model(batch_of(*kind, seed))
            each.append(calls[0])
            out.loss_sum.backward()
            graphs.append(compilation.graphs)
    assert each == [DEPTH + VISION_DEPTH] * BATCHES
    # Static and dynamic ones of the layers, of the last layer, of the image tower, and of its first block, whose input
    # is float32.
    assert graphs[-1] <= (6 if pi05 else 8)
    (report,) = compilation.news(last=True)
    assert report == f"torch.compile made {graphs[-1]} graphs for the policy's {DEPTH + VISION_DEPTH} blocks"
    assert compilation.news(last=True) == []
    assert not torch._dynamo.utils.counters["graph_break"]


class Block(nn.Linear):
    """A block of any policy."""

    def __init__(self):
        super().__init__(4, 4)

    def forward(self, x, kind=0):
        return super().forward(x) + kind


class Broken(Block):
    """Asks for a number in the middle."""

    def forward(self, x, kind=0):
        return super().forward(x) if float(x.sum()) > 0 else super().forward(-x)


def outputs(block, kinds):
    x = torch.arange(8.0).view(2, 4)
    return [block(x, kind) for kind in kinds]


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_a_block_with_too_many_variants_is_reported_and_right(calls, monkeypatch, checkpointing):
    monkeypatch.setattr(blocks, "RECOMPILE_LIMIT", 2)
    compilation, block = Compilation(), Block()
    kinds = [0, 1.5, torch.ones(4), torch.ones(2, 4), torch.ones(1, 4)]
    wanted = outputs(block, kinds)
    with torch._dynamo.config.patch(recompile_limit=2):
        prepare_block(block, checkpointing=checkpointing, compiled=True, compilation=compilation)
        for got, expected in zip(outputs(block, kinds), wanted, strict=True):
            torch.testing.assert_close(got, expected)
    (warning,) = compilation.news(last=False)
    assert warning.startswith("warning: Block runs eagerly for some shapes, as 2 others are compiled")
    assert calls[0] == 2
    assert compilation.news(last=False) == []


def test_a_block_that_is_not_one_graph_is_compiled_in_pieces_and_reported(calls):
    compilation, block = Compilation(), Broken()
    (wanted,) = outputs(block, [0])
    prepare_block(block, checkpointing="none", compiled=True, compilation=compilation)
    (got,) = outputs(block, [0])
    torch.testing.assert_close(got, wanted)
    assert calls[0] >= 2
    (warning,) = compilation.news(last=False)
    assert warning.startswith("warning: Broken cannot be compiled as one graph, which costs speed and memory: ")


def test_without_a_working_compiler_blocks_run_eagerly_and_that_is_reported(monkeypatch):
    def backend(*_):
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    compilation, block = Compilation(), Block()
    wanted = outputs(block, [0, 1])
    prepare_block(block, checkpointing="none", compiled=True, compilation=compilation)
    for got, expected in zip(outputs(block, [0, 1]), wanted, strict=True):
        torch.testing.assert_close(got, expected)
    (warning,) = compilation.news(last=False)
    assert "Block runs eagerly, because torch.compile failed" in warning
    assert "Failed to find C compiler" in warning


def test_classes_do_not_share_the_limit_of_variants(calls, monkeypatch):
    """With checkpointing, all blocks would have one code object."""
    kinds = [type(f"Block{number}", (Block,), {}) for number in range(3)]
    prepared = []
    for kind in kinds:
        block = kind()
        prepare_block(block, checkpointing="full", compiled=True)
        prepared.append(block)
    assert len({block.forward.__wrapped__ for block in prepared}) == 3
    codes = {blocks._checkpointed(block.forward, "full", type(block)).__code__ for block in (*prepared, *prepared)}
    assert len(codes) == 3
