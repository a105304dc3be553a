"""Training changes images by the sample's own draws: the same in any batch, never where the policy is only used."""

import numpy as np
import pytest
import torch
from test_pi0 import build, make_batch

from rlinf_plugins_openpi import Pi05Config
from rlinf_plugins_openpi.inputs.augmentation import (
    MAX_ANGLE,
    MAX_BRIGHTNESS,
    MAX_CONTRAST,
    MAX_HUE,
    MAX_SHIFT,
    OpenpiAugmentationConfig,
)
from rlinf_plugins_openpi.model import augment as preprocessing
from rlinf_plugins_openpi.model.augment import crop_and_rotate, jitter_colors, normalise, resize_with_pad
from rlinf_plugins_openpi.model.dimensions import CAMERAS

SIZE = 24
OPENPI = {"openpi": OpenpiAugmentationConfig()}
BASE, WRIST = CAMERAS[:2]


def augment(images, drawn):
    return preprocessing.augment(images, drawn, OPENPI)


def philox(key):
    return np.random.Generator(np.random.Philox(key))


def draws(count=300):
    """The numbers of many samples, [samples, all cameras, ...]."""
    policy = Pi05Config(variant="dummy", action_horizon=1, action_dim=1)
    drawn = [policy.draw(philox(key))["augmentation"] for key in range(count)]
    return {key: torch.from_numpy(np.stack([one[key] for one in drawn])) for key in drawn[0]}


def numbers(batch, cameras=(BASE,)):
    """Draws for a batch, as the model gets them; colours always change."""
    drawn = draws(batch)
    drawn["openpi.color_jitter"][..., 0] = 1.0
    return {name: {key: value[:, CAMERAS.index(name)] for key, value in drawn.items()} for name in cameras}


def of_rows(drawn, rows):
    return {name: {key: value[rows] for key, value in own.items()} for name, own in drawn.items()}


def pictures(*axes):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (*axes, SIZE, SIZE, 3), dtype=torch.uint8, generator=generator)


def test_noise_and_time_are_drawn_first_and_do_not_change():
    generator = philox(5)
    noise = generator.standard_normal((3, 4), dtype=np.float32)
    time = np.float32(0.001 + 0.999 * generator.random() ** (2 / 3))
    for flag in (True, False):
        drawn = Pi05Config(variant="dummy", action_horizon=3, action_dim=4, augment=flag).draw(philox(5))
        assert np.array_equal(drawn["noise"], noise)
        assert drawn["time"] == time
        assert ("augmentation" in drawn) == flag


def test_draws_fill_the_references_ranges():
    drawn = draws()
    crop, jitter = drawn["openpi.crop_and_rotation"], drawn["openpi.color_jitter"]
    assert not crop[:, 1:].any()  # on wrists
    assert torch.equal(jitter[:, 1], jitter[:, 2])
    reach = crop[:, 0].abs().amax(0) / torch.tensor([MAX_SHIFT, MAX_SHIFT, MAX_ANGLE])
    assert reach.max() <= 1
    assert reach.min() > 0.95
    applied, amounts = jitter[:, :2, 0], jitter[:, :2, 1:]
    assert set(applied.unique().tolist()) == {0.0, 1.0}
    assert 0.4 < applied.mean() < 0.6
    assert (applied[:, 0] != applied[:, 1]).any()
    reach = amounts.abs().amax((0, 1)) / torch.tensor([MAX_BRIGHTNESS, MAX_CONTRAST, MAX_HUE])
    assert reach.max() <= 1
    assert reach.min() > 0.95
    assert (amounts.amin((0, 1)) < 0).all()


def test_an_image_looks_the_same_in_any_batch():
    images, drawn = pictures(3, 2), numbers(3, (BASE, WRIST))
    together = augment(images, drawn)
    for row in range(3):
        alone = augment(images[row : row + 1], of_rows(drawn, slice(row, row + 1)))
        assert torch.equal(alone[0], together[row])


def test_equal_draws_change_different_samples_alike():
    changed = augment(pictures(1, 1).expand(2, -1, -1, -1, -1), of_rows(numbers(1), [0, 0]))
    assert torch.equal(changed[0], changed[1])


def test_wrist_cameras_keep_their_geometry():
    images, drawn = pictures(2, 2), numbers(2, (BASE, WRIST))
    for own in drawn.values():
        own["openpi.color_jitter"][..., 0] = 0.0
    changed = augment(images, drawn)
    assert torch.allclose(changed[:, 1], normalise(images[:, 1]), atol=1e-6)
    assert not torch.allclose(changed[:, 0], normalise(images[:, 0]), atol=0.1)


def test_only_wrist_cameras():
    images, drawn = pictures(2, 1), numbers(2, (WRIST,))
    assert augment(images, drawn).shape == images.shape


def test_bytes_and_numbers_are_changed_alike():
    images, drawn = pictures(2, 1), numbers(2)
    assert torch.equal(augment(images, drawn), augment(normalise(images), drawn))


def test_changed_images_are_float32_within_the_range():
    drawn = numbers(4, (BASE, WRIST))
    rounded = {name: {key: value.bfloat16() for key, value in own.items()} for name, own in drawn.items()}
    changed = augment(pictures(4, 2), rounded)
    assert changed.dtype == torch.float32
    assert changed.min() >= -1 - 1e-6
    assert changed.max() <= 1 + 1e-6


def test_a_crop_moves_towards_its_centre():
    row = torch.arange(SIZE, dtype=torch.float32)
    ramp = (row[:, None] + 100 * row).expand(1, SIZE, SIZE)[..., None].expand(-1, -1, -1, 3)  # down 1, right 100
    middle = slice(SIZE // 2 - 1, SIZE // 2 + 1)
    before, after = (
        crop_and_rotate(ramp, torch.tensor([[down, right, 0.0]]))[0, middle, middle, 0].mean()
        for down, right in ((0.0, 0.0), (2.0, -1.0))
    )
    torch.testing.assert_close(after - before, torch.tensor(2.0 - 100.0))


def test_what_a_rotation_uncovers_is_black():
    turned = crop_and_rotate(torch.ones(1, 224, 224, 3), torch.tensor([[0.0, 0.0, MAX_ANGLE]]))[0, ..., 0]
    assert (turned[0, 0], turned[-1, -1]) == (0, 0)
    assert turned[112, 112] == 1


@pytest.mark.parametrize(
    ("amounts", "channel", "expected"),
    [
        ((0.0, 0.0, 0.0), (0.2, 0.5, 0.9), (0.2, 0.5, 0.9)),
        ((-0.3, 0.0, 0.0), (0.2, 0.5, 1.0), (0.14, 0.35, 0.7)),
        ((0.3, 0.0, 0.0), (0.5, 0.5, 0.5), (0.65, 0.65, 0.65)),
        ((0.3, 0.0, 0.0), (0.0, 0.0, 0.0), (0.3, 0.3, 0.3)),
        ((0.0, 0.4, 0.0), (1.0, 1.0, 1.0), (1.0, 1.0, 1.0)),
        ((0.0, 0.4, 0.0), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        ((0.0, 0.0, 1 / 3), (1.0, 0.25, 0.25), (0.25, 1.0, 0.25)),
        ((0.0, 0.0, -1 / 3), (1.0, 0.25, 0.25), (0.25, 0.25, 1.0)),
        ((0.0, 0.0, 1 / 6), (0.0, 0.6, 0.0), (0.0, 0.6, 0.6)),
    ],
)
def test_colors(amounts, channel, expected):
    pixel = torch.tensor(channel).expand(1, 1, 1, 3)
    changed = jitter_colors(pixel, torch.tensor([[1.0, *amounts]]))
    torch.testing.assert_close(changed[0, 0, 0], torch.tensor(expected), atol=1e-6, rtol=1e-6)
    assert torch.equal(jitter_colors(pixel, torch.tensor([[0.0, *amounts]])), pixel)


def test_contrast_is_continuous_and_grows():
    values = torch.linspace(0, 1, 2001).view(1, 1, -1, 1).expand(-1, -1, -1, 3)
    for contrast in (-0.4, 0.0, 0.4):
        curve = jitter_colors(values, torch.tensor([[1.0, 0.0, contrast, 0.0]]))[0, 0, :, 0]
        steps = curve.diff()
        assert (steps > 0).all()
        assert steps.max() < 1.1e-3


def test_nothing_is_read_back_from_the_device():
    images = torch.empty(2, 2, 224, 224, 3, dtype=torch.uint8, device="meta")
    there = {"openpi.crop_and_rotation": torch.empty(2, 3), "openpi.color_jitter": torch.empty(2, 4)}
    there = {key: value.to("meta") for key, value in there.items()}
    assert augment(images, {BASE: there, WRIST: there}).shape == images.shape


def test_resize_takes_bytes_or_float32():
    with pytest.raises(ValueError, match=r"uint8, or float32 .*float16"):
        resize_with_pad(torch.zeros(2, 2, 3, dtype=torch.float16), 4, 4)


def test_the_loss_sees_changed_images_in_training_mode_alone():
    model, batch = build(), make_batch(cameras=2)
    model.augmentations = OPENPI
    drawn = {"augmentation": numbers(2, (BASE, WRIST))}
    changed = batch | {"images": augment(batch["images"], drawn["augmentation"])}
    plain, expected = model.losses(batch), model.losses(changed)
    assert torch.equal(model.losses(batch | drawn), expected)
    assert not torch.allclose(expected, plain)
    actions = model.sample_actions(batch, batch["noise"], 1)
    assert torch.equal(model.sample_actions(batch | drawn, batch["noise"], 1), actions)
    model.eval()
    assert torch.equal(model.losses(batch | drawn), plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_flow_from_changed_images(dtype):
    model = build()
    model.augmentations = OPENPI
    for unit in model.shard_units():
        unit.module.to(dtype if unit.dtype == "compute" else torch.float32)
    model(make_batch() | {"augmentation": numbers(2)}).loss_sum.backward()
    assert model.vision.patch_embedding.weight.grad.isfinite().all()
    assert model.vision.patch_embedding.weight.grad.any()


@pytest.mark.parametrize("cameras", [(BASE,), CAMERAS, (CAMERAS[2],)])
def test_a_batch_holds_the_numbers_of_its_cameras(cameras):
    policy = Pi05Config(variant="dummy", action_horizon=2, action_dim=3)
    sample = {"images": {name: pictures()[:4, :4].numpy() for name in cameras}, "state": np.zeros(3), "prompt": "lift"}
    for transform in policy.transforms():
        sample = transform(sample)
    samples = [{**sample, **policy.draw(philox(key))} for key in (1, 2)]
    batch = policy.collate(samples)
    assert batch["images"].shape[:2] == (2, len(cameras))
    assert tuple(batch["augmentation"]) == cameras
    for row, sample in enumerate(samples):
        for name, own in batch["augmentation"].items():
            assert own.keys() == {"openpi.crop_and_rotation", "openpi.color_jitter"}
            for key, value in own.items():
                assert value[row].tolist() == sample["augmentation"][key][CAMERAS.index(name)].tolist()


def test_a_batch_without_draws_has_no_numbers():
    policy = Pi05Config(variant="dummy", action_horizon=2, action_dim=3, augment=False)
    sample = {"state": np.zeros(3), "prompt": "lift"}
    for transform in policy.transforms():
        sample = transform(sample)
    batch = policy.collate([{**sample, **policy.draw(philox(1))}])
    assert "augmentation" not in batch
