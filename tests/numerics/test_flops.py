"""What a training step computes at real size: no more than reaches the loss (absent cameras, padding, dead parts)."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from rlinf_plugins_openpi.dimensions import Pi0Dimensions
from rlinf_plugins_openpi.pi0 import Pi0

TOLERANCE = 0.05
ACTION_DIM = 32


@pytest.mark.parametrize(
    ("name", "pi05", "cameras", "text", "horizon", "useful"),
    [
        ("π0.5, 2 of 3 cameras, 57 tokens, horizon 10", True, 2, 57, 10, 7.87e12),
        ("π0.5, 3 cameras, 85 tokens, horizon 50", True, 3, 85, 50, 11.98e12),
        ("π0, 2 of 3 cameras, 17 tokens, horizon 50", False, 2, 17, 50, 7.49e12),
    ],
)
def test_a_step_computes_what_reaches_the_loss(report, name, pi05, cameras, text, horizon, useful):
    """Useful operations: two for each multiply-add of matrix products and attention, forward and backward."""
    with torch.device("meta"):
        model = Pi0(Pi0Dimensions.of("base", pi05=pi05, action_dim=ACTION_DIM, action_horizon=horizon))
        batch = {
            "images": torch.empty(1, cameras, 224, 224, 3, dtype=torch.uint8),
            "image_mask": torch.ones(1, cameras, dtype=torch.bool),
            "tokens": torch.zeros(1, text, dtype=torch.long),
            "token_mask": torch.ones(1, text, dtype=torch.bool),
            "state": torch.empty(1, ACTION_DIM),
            "actions": torch.empty(1, horizon, ACTION_DIM),
            "noise": torch.empty(1, horizon, ACTION_DIM),
            "time": torch.empty(1),
        }
        # The counter does not see inside the CPU's flash attention.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            torch.autograd.backward(model(batch).loss_sum)
    report("step", f"operations, {name}", abs(counter.get_total_flops() / useful - 1), TOLERANCE)
