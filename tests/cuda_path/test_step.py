"""A step as on a GPU: sharded, in bf16, through the stand-in for CUDA's kernel, with the options a user would choose.

The host must not wait, no product may be wider than promised, and losses are those of a plain step.
"""

import itertools
from functools import partial

import pytest
import torch
import torch.distributed as dist
from device_watch import DeviceWatch
from small_pi0 import batch_of, build, with_packing
from tiny_text import sample, some_tokens, tiny_policy, with_values, write_jsonl
from tiny_vision import FAMILIES, chats, model_folder, photo, vision_policy
from torch.distributed.device_mesh import init_device_mesh
from varlen_on_cpu import packed_attention

from rlinf_core.optimizers.adamw import AdamW
from rlinf_core.optimizers.parameters import TrainedParameter
from rlinf_core.optimizers.schedules import openpi_cosine
from rlinf_core.training.state.blocks import prepare_block
from rlinf_core.training.state.ema import Ema
from rlinf_core.training.state.fsdp import set_gradient_sync, shard
from rlinf_core.training.state.optim import Optimizer
from rlinf_plugins_text.plugin import rlinf_open_dataset

ADAMW = AdamW(1e-3, (0.9, 0.95), 1e-8, 1e-10)
SCHEDULE = partial(openpi_cosine, lr=1e-3, min_lr=1e-4, warmup_steps=0, decay_steps=100)
STEPS, MICRO_BATCHES = 2, 2
QUICK = [("none", True, 0.0), ("selective", False, 0.9), ("full", True, 0.9)]
OPTIONS = [
    pytest.param(*one, marks=[] if one in QUICK else [pytest.mark.slow])
    for one in itertools.product(["none", "selective", "full"], [True, False], [0.0, 0.9])
]


@pytest.fixture(scope="module", autouse=True)
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def prepared(policy, checkpointing, reshard):
    for unit in policy.shard_units():
        if unit.block:
            prepare_block(unit.module, checkpointing=checkpointing, compiled=False)
    mesh = init_device_mesh("cpu", (1,))
    shard(policy, mesh, compute_dtype=torch.bfloat16, reshard_after_forward=reshard)
    return policy.train()


def train(policy, batches, *, reshard=True, average=0.0, library=None):
    """Losses of steps of two micro batches, and what happened in the last one."""
    trained = [TrainedParameter(*named) for named in policy.named_parameters()]
    optimizer = Optimizer(trained, ADAMW, SCHEDULE, clip_grad=1.0)
    ema, losses = Ema(policy, average) if average else None, []

    def step():
        for micro in range(MICRO_BATCHES):
            last = micro + 1 == MICRO_BATCHES
            set_gradient_sync(policy, last=last, reduce_every_micro_batch=False, reshard=reshard)
            out = policy(next(batches))
            torch.autograd.backward(out.loss_sum)
            losses.append(out.loss_sum.detach())
        skipped = optimizer.step(out.weight, out.loss_sum.detach()).skipped
        if ema:
            ema.update(skipped)

    for _ in range(STEPS - 1):
        step()
    with DeviceWatch(library) as watch:
        step()
    return torch.stack(losses), watch


def small_batches():
    cameras = itertools.cycle([[[True, True]] * 3, [[True, False], [True, True], [False, True]]])
    made = [batch_of(next(cameras), [5, 3 + seed, 4], seed=seed) for seed in range(STEPS * MICRO_BATCHES)]
    return iter([with_packing(batch, 16) for batch in made])


@pytest.fixture(scope="module", params=[False, True], ids=["pi0", "pi05"])
def plain(request):
    """On the grid, without options."""
    return request.param, train(prepared(build(request.param), "none", True), small_batches())[0]


@pytest.mark.parametrize(("checkpointing", "reshard", "average"), OPTIONS)
def test_a_step_of_pi0_waits_for_nothing(plain, checkpointing, reshard, average):
    pi05, wanted = plain
    policy = prepared(build(pi05), checkpointing, reshard)
    with packed_attention():
        losses, watch = train(policy, small_batches(), reshard=reshard, average=average)
    assert_as_promised(watch)
    torch.testing.assert_close(losses, wanted, rtol=0.02, atol=0)


@pytest.mark.parametrize("packing", [False, True])
def test_a_step_of_a_text_model_waits_for_nothing(packing):
    settings = tiny_policy(max_length=64, packing=packing)
    policy = with_values(settings)
    policy.lm._keeps_padding = True  # As on CUDA.
    made = [
        settings.collate(
            [sample(some_tokens(20 + seed, seed), some_tokens(9, seed + 9)), sample(some_tokens(30, seed))]
        )
        for seed in range(STEPS * MICRO_BATCHES)
    ]
    with packed_attention():
        losses, watch = train(prepared(policy, "none", True), iter(made))
    assert_as_promised(watch)
    assert losses.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_of_a_vision_language_model_waits_only_in_transformers_image_code(tmp_path, family):
    """It reads the sizes of images on the host; nothing of ours does. docs/vlm.md says so."""
    settings, path = vision_policy(model_folder(tmp_path / "model", family)), photo(tmp_path / "a.png").name
    rows = [{"prompt": "what is it?", "completion": "a cat", "images": [path]}]
    data = chats(write_jsonl(tmp_path / "rows.jsonl", rows), format="prompt_completion")
    batch = settings.collate(rlinf_open_dataset(data, settings, "train").__getitems__([0]))
    policy = with_values(settings)
    policy.lm._keeps_padding = True  # As on CUDA.
    with packed_attention():
        losses, watch = train(prepared(policy, "none", True), itertools.repeat(batch), library="/transformers/models/")
    assert_as_promised(watch)
    assert sum(watch.waits_in_library.values()) < 20 * MICRO_BATCHES
    assert losses.isfinite().all()


def assert_as_promised(watch):
    assert not watch.waits
    assert watch.products.keys() <= {torch.bfloat16, torch.float32}
    assert watch.products[torch.bfloat16] > watch.products[torch.float32]
    assert watch.dtypes[torch.float64] == 0


def test_the_watch_sees_what_waits():
    x = torch.arange(4.0)
    with DeviceWatch() as watch:
        x[x > 1].sum().item()
        (x > 1).nonzero()
        x.double() @ x.double()
    assert watch.waits == {".item()": 1, "nonzero()": 1, "a boolean index": 1}
    assert watch.dtypes[torch.float64]
