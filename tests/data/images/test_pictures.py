import io
import zlib

import numpy as np
import pytest
from PIL import Image

from rlinf_core.data.images import pictures
from rlinf_core.data.images.pictures import decode, plain_png
from rlinf_core.errors import UserError


def png(size, mode="RGB"):
    values = np.random.default_rng(sum(size)).integers(0, 3, (*size, 3)).cumsum(axis=1).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(values).convert(mode).save(file, "PNG")
    return file.getvalue()


def by_pillow(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P"])
def test_pngs_are_what_pillow_makes_of_them_in_any_order(mode):
    for size in [(1, 1), (3, 70), (64, 48), (3, 70), (64, 48), (65, 48)]:
        data = png(size, mode)
        assert plain_png(data) == (size if mode == "RGB" else None)
        assert np.array_equal(decode(data, "it"), by_pillow(data))


def test_a_damaged_png_is_refused_wherever_the_damage_is():
    good, random = png((20, 30)), np.random.default_rng(0)
    for place in random.integers(33, len(good), 60).tolist():
        for bad in (good[:place], good[:place] + bytes([good[place] ^ 64]) + good[place + 1 :]):
            found = pictures._decode_png(bad, (20, 30))
            assert found is None or np.array_equal(found, by_pillow(bad))
    with pytest.raises(UserError, match="it contains a damaged image"):
        decode(good[:-40], "it")
    assert np.array_equal(decode(good, "it"), by_pillow(good))  # What came before leaves no trace.


def turned(orientation, kind):
    """An image file, as a phone writes it that was held as EXIF's `orientation` says."""
    values = np.arange(24 * 16 * 3, dtype=np.uint8).reshape(24, 16, 3)
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    Image.fromarray(values).save(file, kind, exif=exif, **{"lossless": True} if kind == "WEBP" else {})
    return file.getvalue(), values


RIGHT = {
    1: lambda image: image,
    2: lambda image: image[:, ::-1],
    3: lambda image: image[::-1, ::-1],
    4: lambda image: image[::-1],
    5: lambda image: image.transpose(1, 0, 2),
    6: lambda image: image.transpose(1, 0, 2)[:, ::-1],
    7: lambda image: image.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda image: image.transpose(1, 0, 2)[::-1],
    9: lambda image: image,  # Not an orientation.
}
"""EXIF's orientation -> the upright image of a stored one (CIPA DC-008)."""


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG", "TIFF"])
@pytest.mark.parametrize("orientation", RIGHT)
def test_images_are_upright_as_their_exif_data_say(kind, orientation):
    data, stored = turned(orientation, kind)
    found = decode(data, "it")
    if kind == "JPEG":
        stored = by_pillow(data)
    assert np.array_equal(found, RIGHT[orientation](stored))


def test_images_are_turned_as_lerobot_turns_them():
    """lerobot reads images by the feature `Image` of datasets."""
    feature = pytest.importorskip("datasets").Image()
    for kind in ("PNG", "JPEG", "WEBP"):
        data, _ = turned(6, kind)
        assert np.array_equal(decode(data, "it"), feature.decode_example({"bytes": data, "path": None}))


@pytest.mark.parametrize("place", [33, -12], ids=["before the pixels", "after them"])
@pytest.mark.parametrize("kind", ["eXIf", "XMP", "hex"])
def test_an_orientation_is_found_wherever_a_png_has_it(kind, place):
    exif = Image.Exif()
    exif[0x0112] = 3
    raw = exif.tobytes()
    chunks = {
        "eXIf": (b"eXIf", raw.removeprefix(b"Exif\0\0")),
        "XMP": (b"iTXt", b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="3"/>'),
        "hex": (b"tEXt", b"Raw profile type exif\0\nexif\n%d\n%s" % (len(raw), raw.hex().encode())),
    }
    name, content = chunks[kind]
    good = png((20, 30))
    chunk = len(content).to_bytes(4, "big") + name + content + zlib.crc32(name + content).to_bytes(4, "big")
    data = good[:place] + chunk + good[place:]
    assert plain_png(good) == (20, 30)
    assert plain_png(data) is None
    assert np.array_equal(decode(data, "it"), by_pillow(good)[::-1, ::-1])


def test_a_text_leaves_a_png_plain():
    good, content = png((20, 30)), b"tEXtSoftware\0camera"
    chunk = (len(content) - 4).to_bytes(4, "big") + content + zlib.crc32(content).to_bytes(4, "big")
    data = good[:33] + chunk + good[33:]
    assert plain_png(data) == (20, 30)
    assert np.array_equal(decode(data, "it"), by_pillow(good))


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def grey_with_alpha_of_16_bits():
    """A PNG of colour type 4, which Pillow reads as 8 bits."""
    head = bytes.fromhex("00000002 00000001 10 04 00 00 00")
    parts = b"IHDR" + head, b"IDAT" + zlib.compress(b"\0" + b"\xff" * 8), b"IEND"
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        (len(part) - 4).to_bytes(4, "big") + part + zlib.crc32(part).to_bytes(4, "big") for part in parts
    )


DEEP, CLEAR = "one channel of 16 or more bits", "transparent somewhere"
NOT_RGB = {
    "16-bit PNG": (encoded(Image.fromarray(np.full((4, 4), 900, np.uint16))), DEEP),
    "16-bit TIFF": (
        encoded(Image.fromarray(np.full((4, 4), 900, np.uint16)), "TIFF"),
        DEEP,
    ),
    "metres in float32": (encoded(Image.new("F", (4, 4), 1.5), "TIFF"), DEEP),
    "16-bit PNG with alpha": (grey_with_alpha_of_16_bits(), DEEP),
    "RGBA": (encoded(Image.new("RGBA", (4, 4), (1, 2, 3, 254))), CLEAR),
    "RGBA WebP": (encoded(Image.new("RGBA", (4, 4), (1, 2, 3, 9)), "WEBP", lossless=True), CLEAR),
    "grey with alpha": (encoded(Image.new("LA", (4, 4), (7, 0))), CLEAR),
    "transparent colour": (
        encoded(Image.new("RGB", (4, 4), (1, 2, 3)), transparency=(1, 2, 3)),
        CLEAR,
    ),
}


@pytest.mark.parametrize("name", NOT_RGB)
def test_what_rgb_cannot_express_is_refused(name):
    data, why = NOT_RGB[name]
    with pytest.raises(UserError, match=rf"row 3 contains an image .*{why}.*data\.images"):
        decode(data, "row 3")
    assert decode(data, "row 3", any_format=True).shape[2] == 3


def test_grey_images_are_repeated_and_opaque_ones_lose_nothing():
    """An infrared camera has one channel of 8 bits; simulators write RGBA that is opaque everywhere."""
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    for image in (Image.fromarray(grey), Image.fromarray(grey).convert("LA"), Image.fromarray(grey).convert("RGBA")):
        assert np.array_equal(decode(encoded(image), "it"), grey[..., None].repeat(3, -1))
