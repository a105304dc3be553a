"""Random erasing against torchvision's: the same pixels for the same rectangle, and rectangles of the same kind."""

import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from rlinf_core.augmentations.random_erasing import RandomErasingConfig

CAMERAS = ("front", "wrist")


def draw(config, count=1, cameras=CAMERAS):
    """[samples, C, ...]"""
    drawn = [config.draw(np.random.Generator(np.random.Philox(key)), cameras) for key in range(count)]
    return {name: np.stack([one[name] for one in drawn]) for name in drawn[0]}


def apply(config, images, drawn):
    return config.apply(images, {name: torch.from_numpy(value) for name, value in drawn.items()}, CAMERAS)


def pictures(count, height=24, width=32):
    return torch.rand(count, len(CAMERAS), height, width, 3, generator=torch.Generator().manual_seed(0))


def pixels(rectangle, height, width):
    """Top, left, height and width, by the definition of the columns."""
    _, high, wide, down, right = map(float, rectangle)
    h, w = max(1, min(height, round(high * height))), max(1, min(width, round(wide * width)))
    return int(down * (height - h + 1)), int(right * (width - w + 1)), h, w


def test_torchvision_erases_the_same_pixels():
    v2 = pytest.importorskip("torchvision.transforms.v2.functional")
    config, images = RandomErasingConfig(value="black"), pictures(40)
    drawn = draw(config, 40)
    erased, before = apply(config, images, drawn), images.clone()
    rectangles = drawn["rectangle"].reshape(-1, 5)
    for image, result, rectangle in zip(images.flatten(0, 1), erased.flatten(0, 1), rectangles, strict=True):
        expected = image.movedim(-1, 0)
        if rectangle[0]:
            expected = v2.erase(expected, *pixels(rectangle, *image.shape[:2]), torch.zeros(3, 1, 1))
        assert torch.equal(result.movedim(-1, 0), expected)
    assert torch.equal(images, before)  # Not in place.


def test_rectangles_are_distributed_as_torchvisions():
    transforms = pytest.importorskip("torchvision.transforms")
    theirs = transforms.RandomErasing(p=1.0)
    torch.manual_seed(0)
    count, size = 4000, 224
    boxes = [theirs.get_params(torch.empty(3, size, size), theirs.scale, theirs.ratio, [0.0])[:4] for _ in range(count)]
    ours = [
        pixels(one, size, size)
        for one in draw(RandomErasingConfig(probability=1.0), count // 2)["rectangle"].reshape(-1, 5)
    ]
    for mine, other in zip(np.transpose(ours), np.transpose(boxes), strict=True):
        levels = (0.1, 0.5, 0.9)
        assert np.abs(np.quantile(mine, levels) - np.quantile(other, levels)).max() < 8  # two standard errors, or so


def test_settings_do_what_they_say():
    drawn = draw(RandomErasingConfig(probability=0.25, area=(0.1, 0.2), aspect=(0.5, 2.0)), 2000)["rectangle"]
    assert drawn.dtype == np.float32
    replaced, high, wide = drawn[..., 0], drawn[..., 1], drawn[..., 2]
    assert abs(replaced.mean() - 0.25) < 0.03
    assert 0.1 - 1e-6 < (high * wide).min() < 0.101
    assert 0.199 < (high * wide).max() < 0.2 + 1e-6
    assert 0.5 - 1e-6 < (high / wide).min() < (high / wide).max() < 2 + 1e-6
    assert abs(np.log(high / wide).mean()) < 0.03
    assert (drawn[:, 0] != drawn[:, 1]).any(axis=-1).all()  # Cameras differ,
    shared = draw(RandomErasingConfig(per_camera=False), 50)
    assert all(np.array_equal(value[:, 0], value[:, 1]) for value in shared.values())  # unless they must not.
    assert not draw(RandomErasingConfig(probability=0.0), 20)["rectangle"][..., 0].any()
    tall = draw(RandomErasingConfig(probability=1.0, area=(0.9, 0.9), aspect=(3.0, 3.0)), 20)["rectangle"]
    assert not tall[..., 0].any()  # No such rectangle fits.


@pytest.mark.parametrize("value", ["random", "black", "mean"])
def test_values(value):
    config = RandomErasingConfig(probability=1.0, value=value)
    images = pictures(20, 64, 64)
    drawn = draw(config, 20)
    erased = apply(config, images, drawn)
    assert erased.dtype == torch.float32
    mask = (erased != images).any(-1)
    shown = erased[mask]
    assert 0.02 < mask.float().mean() < 0.33
    match value:
        case "black":
            assert not shown.any()
        case "mean":
            means = images.mean((2, 3), keepdim=True).expand_as(images)[mask]
            assert torch.equal(shown, means)
        case "random":
            assert 0 <= shown.min() <= shown.max() <= 1
            assert shown.mean(0).tolist() == pytest.approx([0.5] * 3, abs=0.01)
            assert shown.std(0).tolist() == pytest.approx([math.sqrt(1 / 12)] * 3, abs=0.01)
            assert torch.corrcoef(shown.T).triu(1).abs().max() < 0.03
            assert abs(torch.corrcoef(torch.stack((shown[:-1, 0], shown[1:, 0])))[0, 1]) < 0.03


def test_an_image_is_the_same_in_any_batch_and_nothing_is_read_back():
    config, images = RandomErasingConfig(probability=1.0), pictures(3)
    drawn = draw(config, 3)
    together = apply(config, images, drawn)
    alone = apply(config, images[1:2], {name: value[1:2] for name, value in drawn.items()})
    assert torch.equal(together[1:2], alone)
    there = {name: torch.from_numpy(value).to("meta") for name, value in drawn.items()}
    assert config.apply(images.to("meta"), there, CAMERAS).shape == images.shape


@pytest.mark.parametrize(("height", "width"), [(1, 1), (4, 4), (3, 200)])
def test_images_of_any_size(height, width):
    config = RandomErasingConfig(probability=1.0, value="black")
    images = torch.ones(60, len(CAMERAS), height, width, 3)
    drawn = draw(config, 60)
    drawn["rectangle"][..., 3:] = 1.0  # As float32, a number below 1 may be 1.
    erased = (apply(config, images, drawn)[..., 0] == 0).sum((2, 3))
    assert (erased > 0).all()


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"area": (0.3, 0.1)}, "area"), ({"area": (0.0, 0.1)}, "area"), ({"aspect": (0.0, 1.0)}, "aspect")],
)
def test_impossible_ranges_are_refused(settings, said):
    with pytest.raises(ValidationError, match=f"{said} = .* in order"):
        RandomErasingConfig(**settings)


def test_words():
    config = RandomErasingConfig()
    words = [config.describe({"rectangle": np.array([on, 0.25, 0.5, 0.1, 0.1])}, "front") for on in (0, 1)]
    assert words == ["nothing erased", "25% of the height x 50% of the width erased"]
