"""The time of a training draw against the reference's distribution."""

import json

import numpy as np
import pytest

from rlinf_plugins_openpi import Pi05Config

POLICY = Pi05Config(variant="dummy", action_horizon=1, action_dim=1)


class Uniform(np.random.Generator):
    """Draws the uniform number it was given."""

    def __init__(self, value):
        super().__init__(np.random.Philox(0))
        self.value = value

    def random(self):
        return self.value


@pytest.fixture
def recorded(optim_case):
    return json.loads((optim_case / "time_distribution.json").read_text())


def test_time_of_a_uniform_number_is_the_references(recorded, report):
    exact = recorded["exact"]
    ours = np.array([POLICY.draw(Uniform(u))["time"] for u in exact["u"]])
    report("optim/time_distribution", "t(u)", float(np.max(np.abs(ours - exact["t_of_u"]))), 1e-6)


def test_times_are_distributed_as_the_references(recorded, report):
    generator = np.random.default_rng(0)
    times = np.array([POLICY.draw(generator)["time"] for _ in range(200_000)])
    levels = [float(level) for level in recorded["quantiles"]]
    distance = np.abs(np.quantile(times, levels) - list(recorded["quantiles"].values())).max()
    report("optim/time_distribution", "quantiles", float(distance), 5e-3)  # five standard errors of a quantile
    assert 0 < times.min() < times.max() <= 1
