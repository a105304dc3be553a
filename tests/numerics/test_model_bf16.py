"""bfloat16 compute as training does it, wrapped by the trainer's own sharding, against the reference in bfloat16."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from golden import name_of
from pi0_case import read_batch, read_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import register_fsdp_forward_method

from rlinf_core.training.state.fsdp import shard
from rlinf_plugins_openpi.model.dimensions import CAMERAS

FLOOR = 0.019
"""bfloat16 and float32 differ by 0.7 to 1.9 % within the reference."""


@pytest.fixture(scope="module")
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def rms_distance(ours, theirs):
    return float(np.sqrt(np.mean((ours - theirs) ** 2) / np.mean(theirs**2)))


@torch.no_grad()
def run_sharded(folder, mesh, quantities):
    """Every quantity asked for that the sharded model computes, float32."""
    inputs = dict(np.load(folder / "inputs.npz"))
    model, batch, seen = read_model(folder), read_batch(inputs), {}
    shard(model, mesh, compute_dtype=torch.bfloat16)
    register_fsdp_forward_method(model, "losses")
    model.action_out_proj.register_forward_hook(lambda *call: seen.update(v_t=call[-1]))
    model.expert_norm.register_forward_hook(lambda *call: seen.update(suffix_out=call[-1][0]))
    model.vision.head.register_forward_hook(lambda *call: seen.update(image_tokens=call[-1]))
    seen["loss"] = model.losses(batch)
    there = seen.pop("image_tokens")
    tokens = there.new_full((*batch["image_mask"].shape, *there.shape[1:]), torch.nan)
    tokens[batch["image_mask"]] = there
    for camera, seen_by_it in zip(CAMERAS, tokens.unbind(1), strict=True):
        seen[f"image_tokens/{camera}"] = seen_by_it  # NaN where a sample lacks it, which is not computed.
    ours = {name: value.float().numpy() for name, value in seen.items()}
    noise = torch.from_numpy(inputs["sample_noise"])
    for quantity in quantities:
        if quantity.startswith("sample_actions/steps"):
            steps = int(quantity.removeprefix("sample_actions/steps"))
            ours[quantity] = model.sample_actions(batch, noise, steps).numpy()
    return {name: value for name, value in ours.items() if name in quantities}


def test_bf16_is_as_close_as_bf16_can_be(model_case, mesh, report):
    path = model_case / "outputs_bf16.npz"
    if not path.is_file():
        pytest.skip(f"{model_case} has no bf16 outputs")
    theirs, exact = dict(np.load(path)), dict(np.load(model_case / "outputs.npz"))
    for key in (key for key in theirs if key.startswith("image_tokens/")):
        first = CAMERAS.index(key.partition("/")[2]) * theirs[key].shape[1]
        exact[key] = exact["prefix_tokens"][:, first : first + theirs[key].shape[1]]
    ours = run_sharded(model_case, mesh, theirs.keys())
    assert {"v_t", "loss", "suffix_out"} < ours.keys()
    for quantity, value in ours.items():
        there = ~np.isnan(value).reshape(len(value), -1)[:, 0] if quantity.startswith("image_tokens/") else slice(None)
        value, theirs[quantity], exact[quantity] = (x[there] for x in (value, theirs[quantity], exact[quantity]))
        if not len(value):
            continue
        own = rms_distance(theirs[quantity], exact[quantity])
        tolerance = max(1.25 * own, FLOOR)
        report(f"{name_of(model_case)}/bf16", quantity, rms_distance(value, theirs[quantity]), tolerance)
