"""What a training step computes: no more than reaches the loss (absent cameras, padding, dead parts are left out)."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from rlinf_plugins_openpi.model.dimensions import GemmaDimensions, Pi0Dimensions, VisionDimensions
from rlinf_plugins_openpi.model.flops import training_flops
from rlinf_plugins_openpi.model.packing import pack
from rlinf_plugins_openpi.model.pi0 import Pi0

ANCHORED = 0.01
OVERHEAD = 1.02
PADDED_ATTENTION = 1.25
"""Off CUDA attention is padded to the longest sample; at the CPU's size it is a fifth of all operations."""
ACTION_DIM = 32
CPU_SIZE = Pi0Dimensions(
    pi05=True,
    action_dim=ACTION_DIM,
    action_horizon=10,
    vocab_size=512,
    vlm=GemmaDimensions(width=256, depth=4, mlp_dim=1024, num_heads=8, num_kv_heads=1, head_dim=32),
    expert=GemmaDimensions(width=128, depth=4, mlp_dim=512, num_heads=8, num_kv_heads=1, head_dim=32),
    vision=VisionDimensions(width=128, depth=4, mlp_dim=512, num_heads=4),
)
"""The size of benchmarks/training_step.py on a CPU."""


def base(*, pi05, horizon):
    return Pi0Dimensions.of("base", pi05=pi05, action_dim=ACTION_DIM, action_horizon=horizon)


def counted(dimensions, present, texts, *, multiple=1):
    """Operations of a step, two for each multiply-add of matrix products and attention, forward and backward.

    Args:
        present: By sample, which of the batch's cameras it has.
        texts: By sample, the tokens of its prompt.
    """
    size, cameras, length = len(texts), len(present[0]), max(texts)
    image_mask = torch.tensor(present)
    token_mask = torch.arange(length) < torch.tensor(texts)[:, None]
    packing = pack(image_mask, token_mask, image_tokens=dimensions.vision.num_tokens, multiple=multiple)
    with torch.device("meta"):
        model = Pi0(dimensions)
        batch = {
            "images": torch.empty(size, cameras, 224, 224, 3, dtype=torch.uint8),
            "tokens": torch.zeros(size, length, dtype=torch.long),
            "state": torch.empty(size, ACTION_DIM),
            "actions": torch.empty(size, dimensions.action_horizon, ACTION_DIM),
            "noise": torch.empty(size, dimensions.action_horizon, ACTION_DIM),
            "time": torch.empty(size),
            "packing": {name: tensor.to("meta") for name, tensor in packing.items()},
        }
        # The counter does not see inside the CPU's flash attention.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            torch.autograd.backward(model(batch).loss_sum)
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("name", "pi05", "cameras", "text", "horizon", "useful"),
    [
        ("π0.5, 2 of 3 cameras, 57 tokens, horizon 10", True, 2, 57, 10, 7.87e12),
        ("π0.5, 3 cameras, 85 tokens, horizon 50", True, 3, 85, 50, 11.98e12),
        ("π0, 2 of 3 cameras, 17 tokens, horizon 50", False, 2, 17, 50, 7.49e12),
    ],
)
def test_a_step_computes_what_reaches_the_loss(report, name, pi05, cameras, text, horizon, useful):
    operations = counted(base(pi05=pi05, horizon=horizon), [[True] * cameras], [text])
    report("step", f"operations, {name}", abs(operations / useful - 1), ANCHORED)


MIXED = [[True, True, False], [True, False, False], [True, True, True], [True, True, False]]


@pytest.mark.parametrize(
    ("name", "dimensions", "present", "texts", "multiple", "allowed"),
    [
        ("CPU size, 2 cameras, 57 tokens", CPU_SIZE, [[True] * 2] * 8, [57] * 8, 1, OVERHEAD),
        ("CPU size, 3 cameras, 85 tokens", CPU_SIZE, [[True] * 3] * 8, [85] * 8, 1, OVERHEAD),
        ("CPU size, all different", CPU_SIZE, MIXED, [57, 12, 85, 33], 1, PADDED_ATTENTION),
        ("real size, all different", base(pi05=True, horizon=50), MIXED, [57, 12, 85, 33], 64, 1.03),
        ("real size, 16 samples, filled up", base(pi05=True, horizon=10), [[True] * 2] * 16, [57] * 16, 256, OVERHEAD),
    ],
)
def test_a_batch_costs_what_its_samples_are_worth(report, name, dimensions, present, texts, multiple, allowed):
    """Samples pay neither for cameras and words that others have nor, but for a little, for being laid end to end."""
    operations = counted(dimensions, present, texts, multiple=multiple)
    samples = zip(present, texts, strict=True)
    useful = sum(training_flops(dimensions, images=sum(cameras), text=text) for cameras, text in samples)
    report("step", f"operations beyond useful ones, {name}", operations / useful - 1, allowed - 1)
