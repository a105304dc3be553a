"""The policies' transforms and batches, and relative actions with their inverse."""

import numpy as np
import pytest
import torch

from rlinf_core import UserError
from rlinf_core.data.normalize import NormStats
from rlinf_core.data.pipeline import build_pipeline
from rlinf_core.data.transforms import RelativeActions, SliceActions
from rlinf_plugins_openpi import Pi0Config
from rlinf_plugins_openpi.datasets.libero import Pi0LiberoConfig
from rlinf_plugins_openpi.inputs.collate import stack
from rlinf_plugins_openpi.inputs.tokenizer import SMALL_MODEL, PromptTokenizer
from rlinf_plugins_openpi.inputs.transforms import PadToActionDim, ResizeWithPad, TokenizePrompt
from rlinf_plugins_openpi.model.dimensions import CAMERAS


def image(height, width, value=200):
    return np.full((height, width, 3), value, dtype=np.uint8)


def encoded(rng, *, cameras=CAMERAS[:1], valid=5, length=48, horizon=3, width=8):
    """A sample as it leaves the pipeline."""
    return {
        "images": {name: rng.integers(0, 256, (224, 224, 3), dtype=np.uint8) for name in cameras},
        "tokens": np.where(np.arange(length) < valid, 7, 0),
        "token_mask": np.arange(length) < valid,
        "state": rng.normal(size=width),
        "actions": rng.normal(size=(horizon, width)),
        "actions_is_pad": np.arange(horizon) == horizon - 1,
        "noise": rng.normal(size=(horizon, width)).astype(np.float32),
        "time": np.float32(rng.random()),
        "prompt": "lift",
    }


@pytest.mark.parametrize(("height", "width"), [(480, 640), (640, 480), (97, 301), (20, 20)])
def test_resize_keeps_aspect_and_centres_on_black(height, width):
    out = ResizeWithPad(224, 224)({"images": {"base_0_rgb": image(height, width)}})["images"]["base_0_rgb"]
    inside = out.any(axis=(1, 2)), out.any(axis=(0, 2))
    sizes = [int(axis.sum()) for axis in inside]
    assert out.shape == (224, 224, 3)
    assert max(sizes) == 224
    assert sizes[0] / sizes[1] == pytest.approx(height / width, rel=0.02)
    for axis, size in zip(inside, sizes, strict=True):
        assert int(axis.argmax()) == (224 - size) // 2


def test_resize_leaves_an_image_of_the_right_size_alone():
    sample = {"images": {"base_0_rgb": image(224, 224)}}
    assert ResizeWithPad(224, 224)(sample)["images"]["base_0_rgb"] is sample["images"]["base_0_rgb"]


def test_resize_refuses_what_is_not_an_image():
    with pytest.raises(UserError, match="'base_0_rgb' is float32"):
        ResizeWithPad(224, 224)({"images": {"base_0_rgb": image(10, 10).astype(np.float32)}})


def test_transforms_accept_samples_without_images_and_actions():
    sample = {"state": np.zeros(3), "prompt": "lift"}
    for transform in (ResizeWithPad(224, 224), PadToActionDim(8), SliceActions(3), RelativeActions((True,))):
        assert "actions" not in transform(sample)


def test_pad_fills_state_and_actions_with_zeros():
    sample = {"state": np.ones(3, dtype=np.float32), "actions": np.ones((2, 4)), "prompt": ""}
    out = PadToActionDim(6)(sample)
    assert out["state"].tolist() == [1, 1, 1, 0, 0, 0]
    assert out["actions"].tolist() == [[1, 1, 1, 1, 0, 0]] * 2
    assert sample["state"].shape == (3,)


def test_pad_makes_a_state_where_there_is_none():
    assert PadToActionDim(2)({"prompt": "lift"})["state"].tolist() == [0, 0]


def test_pad_refuses_what_is_too_wide():
    with pytest.raises(UserError, match=r"`actions` has 9 numbers.*8.*data\.actions"):
        PadToActionDim(8)({"actions": np.zeros((2, 9)), "prompt": ""})


def test_discrete_state_without_a_state_says_what_to_set():
    with pytest.raises(UserError, match="discrete_state_input"):
        TokenizePrompt(PromptTokenizer(SMALL_MODEL, 48), discrete_state=True)({"prompt": "lift"})


def test_relative_actions_come_back():
    rng = np.random.default_rng(0)
    sample = {"state": rng.normal(size=5), "actions": rng.normal(size=(4, 7))}
    transform = RelativeActions((True, False, True))
    relative = transform(sample)
    assert np.array_equal(relative["actions"][:, [1, 3, 4, 5, 6]], sample["actions"][:, [1, 3, 4, 5, 6]])
    assert np.allclose(relative["actions"][:, 2], sample["actions"][:, 2] - sample["state"][2])
    assert np.allclose(transform.inverse(relative)["actions"], sample["actions"])


def test_relative_actions_come_back_for_a_batch():
    rng = np.random.default_rng(0)
    batch = {"state": rng.normal(size=(2, 5)), "actions": rng.normal(size=(2, 4, 7))}
    transform = RelativeActions((True,) * 5)
    assert np.allclose(transform.inverse(transform(batch))["actions"], batch["actions"])


def test_relative_mask_longer_than_the_state_is_refused():
    with pytest.raises(UserError, match=r"dimension 5 of the action.*7 numbers.*state 4.*data\.relative"):
        RelativeActions((True,) * 6)({"state": np.zeros(4), "actions": np.zeros((2, 7))})


def test_slice_checks_the_data_and_cuts_the_policys_actions():
    sample = {"actions": np.zeros((2, 7))}
    assert SliceActions(7)(sample) is sample
    assert SliceActions(7).inverse({"actions": np.zeros((2, 32))})["actions"].shape == (2, 7)
    with pytest.raises(UserError, match="7 numbers, the config says 4"):
        SliceActions(4)(sample)


def test_actions_survive_the_whole_pipeline():
    rng = np.random.default_rng(0)
    dataset, policy = Pi0LiberoConfig(), Pi0Config(variant="dummy", action_horizon=4)
    row = {
        **{column: image(64, 48) for column in dataset.images.values()},
        "state": rng.normal(size=8).astype(np.float32),
        "actions": rng.normal(size=(4, 7)).astype(np.float32),
        "actions_is_pad": np.zeros(4, dtype=bool),
        "task": "open the drawer",
    }
    stats = {
        key: NormStats(*rng.normal(size=(1, width)), *rng.uniform(1, 2, (1, width)), *np.zeros((2, width)))
        for key, width in (("state", 8), ("actions", 7))
    }
    pipeline = build_pipeline(dataset, policy, stats)
    sample = pipeline.encode(row)
    batch = policy.collate([{**sample, **policy.draw(rng)}] * 2)
    assert batch["actions"].shape == (2, 4, 32)
    assert np.allclose(pipeline.decode(batch["actions"][0].numpy(), sample), row["actions"], atol=1e-5)


def test_batch_has_the_models_shapes_and_dtypes():
    rng = np.random.default_rng(0)
    batch = stack([encoded(rng), encoded(rng)])
    assert {key: (tuple(value.shape), value.dtype) for key, value in batch.items()} == {
        "images": ((2, 1, 224, 224, 3), torch.uint8),
        "image_mask": ((2, 1), torch.bool),
        "tokens": ((2, 16), torch.int64),
        "token_mask": ((2, 16), torch.bool),
        "state": ((2, 8), torch.float32),
        "actions": ((2, 3, 8), torch.float32),
        "actions_is_pad": ((2, 3), torch.bool),
        "noise": ((2, 3, 8), torch.float32),
        "time": ((2,), torch.float32),
    }


def test_batch_at_inference_has_no_actions():
    sample = encoded(np.random.default_rng(0))
    batch = stack([{key: sample[key] for key in ("images", "tokens", "token_mask", "state", "prompt")}])
    assert set(batch) == {"images", "image_mask", "tokens", "token_mask", "state"}


def test_batch_keeps_the_order_of_cameras_and_masks_those_a_sample_lacks():
    rng = np.random.default_rng(0)
    first = encoded(rng, cameras=["right_wrist_0_rgb", "base_0_rgb"])
    second = encoded(rng, cameras=["base_0_rgb"])
    batch = stack([first, second])
    assert batch["image_mask"].tolist() == [[True, True], [True, False]]
    assert np.array_equal(batch["images"][0, 0], first["images"]["base_0_rgb"])
    assert np.array_equal(batch["images"][0, 1], first["images"]["right_wrist_0_rgb"])
    assert not batch["images"][1, 1].any()


def test_batch_without_images_keeps_one_masked_camera():
    batch = stack([encoded(np.random.default_rng(0), cameras=[])])
    assert batch["image_mask"].tolist() == [[False]]


def test_batch_refuses_an_unknown_camera():
    with pytest.raises(UserError, match=r"no camera 'front'.*base_0_rgb"):
        stack([encoded(np.random.default_rng(0), cameras=["front"])])


@pytest.mark.parametrize(
    ("valid", "length"), [([1, 16], 16), ([17, 2], 32), ([48, 3], 48), ([40, 3], 48), ([39, 0], 39)]
)
def test_batch_cuts_padding_tokens_to_a_few_lengths(valid, length):
    rng = np.random.default_rng(0)
    batch = stack([encoded(rng, valid=count, length=39 if 39 in valid else 48) for count in valid])
    assert batch["tokens"].shape == (2, length)
    assert batch["token_mask"].sum(dim=1).tolist() == valid
