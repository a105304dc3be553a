"""The useful operations of a sample: published sizes come out as they were counted by hand."""

import subprocess
import sys

import pytest

from rlinf_plugins_openpi.model.dimensions import Pi0Dimensions
from rlinf_plugins_openpi.model.flops import forward_flops, training_flops


@pytest.mark.parametrize(
    ("pi05", "images", "text", "horizon", "teraflops"),
    [(True, 2, 57, 10, 7.87), (True, 3, 85, 50, 11.98), (False, 2, 17, 50, 7.49), (False, 3, 17, 50, 11.17)],
)
def test_published_sizes(pi05, images, text, horizon, teraflops):
    base = Pi0Dimensions.of("base", pi05=pi05, action_dim=32, action_horizon=horizon)
    assert training_flops(base, images=images, text=text) / 1e12 == pytest.approx(teraflops, rel=0.01)


def test_parts_of_a_step():
    base = Pi0Dimensions.of("base", pi05=True, action_dim=32, action_horizon=10)
    parts = forward_flops(base, images=2, text=57)
    shares = [round(100 * part / sum(parts), 1) for part in parts]
    assert shares == [16.8, 81.2, 1.8, 0.2]
    assert training_flops(base, images=2, text=57) == pytest.approx(
        3 * sum(parts), rel=1e-3
    )  # Pixels need no gradient.


def test_counting_needs_no_torch():
    code = "import sys, rlinf_plugins_openpi.model.flops; sys.exit(any(n in sys.modules for n in ('torch', 'numpy')))"
    subprocess.run([sys.executable, "-c", code], check=True)
