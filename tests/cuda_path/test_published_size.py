"""The published sizes on a CUDA device that does not exist: passes of shapes, dtypes and devices, without values.

Fake tensors take the branches that CUDA tensors take. An operation that mixes devices fails, and so does one that reads
a value on the host (`.item()`, `nonzero`, a boolean index).
"""

import numpy as np
import pytest
import torch
from device_watch import DeviceWatch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from rlinf_core.training.distributed.processes import to_device
from rlinf_core.training.state.fsdp import gathered_together
from rlinf_plugins_openpi import Pi0Config, Pi05Config
from rlinf_plugins_openpi.model import pi0

CAMERAS = ["base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb"]
SAMPLES = 4
PUBLISHED = {"variant": "base", "weights": "random", "tokenizer": "google/paligemma-3b-pt-224"}
CASES = {
    "pi05": (Pi05Config(**PUBLISHED, action_horizon=10), CAMERAS[:2]),
    "pi05 with what is optional": (
        Pi05Config(**PUBLISHED, action_horizon=50, mask_padded_steps=True, mask_padded_dims=True, augment=False),
        CAMERAS,
    ),
    "pi0": (Pi0Config(**PUBLISHED), CAMERAS[:2]),
}


def on_fake_cuda(config, cameras, mode):
    """The policy in the dtypes in which its parameters are gathered, and a batch, on `cuda`."""
    sample = config.largest_sample(cameras)
    batch = config.collate([{**sample, **config.draw(np.random.default_rng(i))} for i in range(SAMPLES)])
    with mode, torch.device("cuda"):
        policy = config.build_to_count()
        dtypes = {}
        for module, dtype in gathered_together(policy, compute_dtype=torch.bfloat16, min_unit_size=1_000_000):
            for parameter in module.parameters():
                dtypes.setdefault(parameter, dtype)
        for module in policy.modules():
            for name, parameter in module.named_parameters(recurse=False):
                own = torch.empty(parameter.shape, dtype=dtypes[parameter])
                setattr(module, name, nn.Parameter(own))

        def fake(value):
            return {k: fake(v) for k, v in value.items()} if isinstance(value, dict) else mode.from_tensor(value)

        return policy.train(), to_device(fake(batch), torch.device("cuda"))


@pytest.mark.slow  # 20 s each.
@pytest.mark.parametrize(
    "name", ["pi05", *(pytest.param(name, marks=pytest.mark.slow) for name in CASES if name != "pi05")]
)
def test_training_and_sampling_wait_for_nothing_and_have_the_promised_dtypes(name, monkeypatch):
    config, cameras = CASES[name]
    size, mode = config.dimensions, FakeTensorMode()
    policy, batch = on_fake_cuda(config, cameras, mode)
    with mode, DeviceWatch() as watch:
        out = policy(batch)
    assert (out.loss_sum.device.type, out.loss_sum.dtype) == ("cuda", torch.float32)
    blocks = 4 * size.vision.depth + 1 + 4 * (size.vlm.depth - 1) + 1 + 4 * size.expert.depth + size.pi05
    small = 1 + (4 if size.pi05 else 5)  # Patches; actions, time and state, and the velocity.
    assert watch.products == {torch.bfloat16: blocks, torch.float32: small}
    assert watch.dtypes[torch.float64] == 0
    assert not watch.waits
    assert not watch.copies

    monkeypatch.setattr(pi0, "euler_times", lambda steps: [1.0] * steps)  # Numbers of the host alone.
    with mode, torch.no_grad(), DeviceWatch() as watch:
        noise = torch.empty(SAMPLES, config.action_horizon, config.action_dim, device="cuda")
        actions = policy.eval().sample_actions(batch, noise, 2)
    assert (actions.device.type, actions.shape) == ("cuda", noise.shape)
    assert watch.dtypes[torch.float64] == 0
    assert not watch.waits
    assert not watch.copies
