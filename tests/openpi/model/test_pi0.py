"""The model's behaviour where no golden data looks: precision, masks, initial values, sharding units, imports."""

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from rlinf_plugins_openpi.model.attention import KeysValues, attend
from rlinf_plugins_openpi.model.augment import normalise, resize_with_pad
from rlinf_plugins_openpi.model.dimensions import GemmaDimensions, Pi0Dimensions
from rlinf_plugins_openpi.model.pi0 import Pi0, euler_times

SMALL_PROJECTIONS = ("action_in_proj.", "action_out_proj.", "state_proj.", "time_mlp_", "action_time_mlp_")


def build(pi05=True):
    with torch.device("meta"):
        model = Pi0(Pi0Dimensions.of("dummy", pi05=pi05, action_dim=8, action_horizon=5))
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = model.initial_value(name, tuple(parameter.shape), generator)
            # The adaptive norms start at zero, which shuts the expert's gates: open them, or little is tested.
            parameter.copy_(value.normal_(0.0, 0.1, generator=generator) if name.startswith("modulation.") else value)
    return model


def make_batch(size=2, cameras=1, text=6, horizon=5, action_dim=8):
    generator = torch.Generator().manual_seed(1)
    normal = {"state": (size, action_dim), "actions": (size, horizon, action_dim), "noise": (size, horizon, action_dim)}
    return {
        "images": torch.randint(0, 256, (size, cameras, 224, 224, 3), dtype=torch.uint8, generator=generator),
        "image_mask": torch.ones(size, cameras, dtype=torch.bool),
        "tokens": torch.randint(0, 512, (size, text), generator=generator),
        "token_mask": torch.ones(size, text, dtype=torch.bool),
        "time": torch.rand(size, generator=generator),
        **{name: torch.randn(shape, generator=generator) for name, shape in normal.items()},
    }


@pytest.mark.parametrize("pi05", [False, True])
def test_compute_units_may_be_bfloat16(pi05):
    exact, batch = build(pi05), make_batch()
    rounded = copy.deepcopy(exact)
    for unit in rounded.shard_units():
        unit.module.to(torch.bfloat16 if unit.dtype == "compute" else torch.float32)
    output = rounded(batch)
    output.loss_sum.backward()
    assert output.loss_sum.dtype == output.weight.dtype == torch.float32
    assert all(p.grad.isfinite().all() for p in rounded.parameters() if p.grad is not None)
    assert abs(output.loss_sum / exact(batch).loss_sum - 1) < 0.03
    sampled, expected = (model.sample_actions(batch, batch["noise"]) for model in (rounded, exact))
    assert sampled.dtype == torch.float32
    assert (sampled - expected).norm() < 0.03 * expected.norm()


def test_loss_is_a_sum_over_chunks_of_the_mean_over_action_dims():
    model, batch = build(), make_batch(size=3)
    output, losses = model(batch), model.losses(batch)
    assert losses.shape == (3, 5)
    assert output.weight == 15
    torch.testing.assert_close(output.loss_sum, losses.sum())
    one = {key: value[:1] for key, value in batch.items()}
    torch.testing.assert_close(model.losses(one), losses[:1])


def test_padding_may_be_left_out_of_the_loss():
    """The terms that are left are those of the unmasked loss, and their number is the weight."""
    model, batch = build(), make_batch(size=2)
    batch["actions_is_pad"] = torch.tensor([[False] * 5, [False, False, True, True, True]])
    batch["action_width"] = torch.tensor([8, 3])
    noise, actions, time = batch["noise"], batch["actions"], batch["time"][:, None, None]
    suffix = model.embed_suffix(batch["state"], time * noise + (1 - time) * actions, batch["time"])
    velocity = model.velocity(model.run(model.embed_prefix(batch), suffix))
    error = (velocity - (noise - actions)).square()
    model.mask_padded_steps = True
    steps = model(batch)
    assert steps.weight == 7
    torch.testing.assert_close(steps.loss_sum, error[0].mean(-1).sum() + error[1, :2].mean(-1).sum())
    model.mask_padded_dims = True
    both = model(batch)
    assert both.weight == 7
    torch.testing.assert_close(both.loss_sum, error[0].mean(-1).sum() + error[1, :2, :3].mean(-1).sum())


@pytest.mark.parametrize("pi05", [False, True])
def test_nothing_to_see_is_not_nan(pi05):
    model, batch = build(pi05), make_batch()
    batch["image_mask"][0], batch["token_mask"][0] = False, False
    model(batch).loss_sum.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert model.sample_actions(batch, batch["noise"], 2).isfinite().all()


def test_masked_input_has_no_influence():
    model, batch = build(), make_batch(cameras=2)
    batch["image_mask"][:, 1], batch["token_mask"][:, 4:] = False, False
    before = model.losses(batch)
    batch["images"][:, 1], batch["tokens"][:, 4:] = 0, 7
    torch.testing.assert_close(model.losses(batch), before)


def test_state_matters_to_pi0_alone():
    batch = make_batch()
    moved = batch | {"state": batch["state"] + 1.0}
    pi0, pi05 = build(pi05=False), build(pi05=True)
    assert not torch.allclose(pi0.losses(batch), pi0.losses(moved))
    assert torch.equal(pi05.losses(batch), pi05.losses(moved))


def test_default_number_of_sampling_steps_is_the_constructors():
    dimensions = Pi0Dimensions.of("dummy", pi05=True, action_dim=8, action_horizon=5)
    model, batch = Pi0(dimensions, num_sampling_steps=3), make_batch()
    model.load_state_dict(build().state_dict())
    noise = batch["noise"]
    assert torch.equal(model.sample_actions(batch, noise), model.sample_actions(batch, noise, 3))
    assert not torch.equal(model.sample_actions(batch, noise), model.sample_actions(batch, noise, 10))


def test_n_euler_steps_are_n():
    assert all(len(euler_times(steps)) == steps for steps in range(1, 129))


def test_images_of_another_size_are_resized_as_the_reference_does():
    model, batch = build(), make_batch()
    small = batch["images"][:, :, :112, :80]
    resized = resize_with_pad(normalise(small), 224, 224)
    assert torch.equal(model.losses(batch | {"images": small}), model.losses(batch | {"images": resized}))


def test_the_image_tower_takes_images_of_its_size():
    with pytest.raises(ValueError, match=r"images must be uint8, or float32 .*\[N, 224, 224, 3\].*\[2, 112, 224, 3\]"):
        build().vision(make_batch()["images"][:, 0, :112])


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("query_rows", [1, 3])
def test_grouped_attention_is_attention_with_repeated_keys(kv_heads, query_rows):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 3, 4, 8, generator=generator)
    keys, values = torch.randn(2, 2, 5, kv_heads, 8, generator=generator)
    bias = torch.randn(2, 1, query_rows, 5, generator=generator)
    repeated = [x.repeat_interleave(4 // kv_heads, dim=2).transpose(1, 2) for x in (keys, values)]
    expected = F.scaled_dot_product_attention(q.transpose(1, 2), *repeated, attn_mask=bias.expand(2, 4, 3, 5))
    ours = attend(q, KeysValues(keys, values), bias)
    torch.testing.assert_close(ours, expected.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("pi05", [False, True])
def test_units_cover_everything_but_the_small_projections(pi05):
    model = build(pi05)
    inside = [id(p) for unit in model.shard_units() for p in unit.module.parameters()]
    assert len(inside) == len(set(inside))
    rest = {name for name, p in model.named_parameters() if id(p) not in set(inside)}
    assert rest
    assert all(name.startswith(SMALL_PROJECTIONS) for name in rest)


def test_initial_values_come_from_the_generator_alone():
    model = build()
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        first = model.initial_value(name, shape, torch.Generator().manual_seed(3))
        torch.manual_seed(4)
        with torch.device("meta"):
            again = model.initial_value(name, shape, torch.Generator().manual_seed(3))
        assert torch.equal(first, again)
        assert (tuple(first.shape), first.dtype, first.device.type) == (shape, torch.float32, "cpu")
        other = model.initial_value(name, shape, torch.Generator().manual_seed(5))
        assert torch.equal(first, other) == (first == first.flatten()[0]).all()


@pytest.mark.parametrize(
    ("name", "shape", "std"),
    [
        ("embedding.weight", (512, 256), 0.01),
        ("vision.patch_embedding.weight", (96, 3, 14, 14), (3 * 14 * 14) ** -0.5),
        ("vision.patch_embedding.position", (256, 96), 96**-0.5),
        ("vision.blocks.0.fc1.weight", (256, 96), (2 / (256 + 96)) ** 0.5),
        ("vision.blocks.0.fc1.bias", (4096,), 1e-6),
        ("vision.head.projector.weight", (96, 128), 128**-0.5),
        ("layers.0.vlm.down_proj.weight", (96, 256), 256**-0.5),
        ("modulation.weight", (288, 96), 0.0),
        ("layers.0.vlm.input_norm.weight", (96,), 0.0),
        ("action_in_proj.bias", (96,), 0.0),
    ],
)
def test_initial_spread_is_the_references(name, shape, std):
    value = build().initial_value(name, shape, torch.Generator().manual_seed(0))
    assert abs(float(value.std()) - std) <= 0.05 * std


def test_experts_must_match():
    base = Pi0Dimensions.of("base", pi05=True, action_dim=32, action_horizon=50)
    expert = GemmaDimensions(width=64, depth=2, mlp_dim=64, num_heads=8, num_kv_heads=1, head_dim=256)
    with pytest.raises(ValueError, match="depth must be equal"):
        Pi0Dimensions(True, 32, 50, 512, base.vlm, expert, base.vision)


def test_model_needs_torch_alone():
    code = """
import sys
for name in ("pydantic", "pluggy", "lerobot", "numpy", "safetensors", "transformers"):
    sys.modules[name] = None
from rlinf_plugins_openpi.model import augment, gemma, pi0, siglip
"""
    subprocess.run([sys.executable, "-c", code], check=True)
