import io

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
