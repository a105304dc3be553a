"""ManiSkill itself, where it is installed (`uv sync --group maniskill`) and can render: a GPU, or Mesa from 24.3."""

import numpy as np
import pytest

from rlinf_core import Start, UserError
from rlinf_plugins_maniskill.config import ManiskillConfig
from rlinf_plugins_maniskill.tasks import KNOWN

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
pytest.importorskip("mani_skill")


def build(name, **settings):
    config = ManiskillConfig(**settings)
    [task] = [one for one in config.tasks() if one.name == name]
    try:
        return config.build(task)
    except UserError as error:
        if "cannot render" in str(error):
            pytest.skip(str(error))
        raise


@pytest.mark.parametrize("name", KNOWN)
def test_episodes_follow_from_their_seeds_alone(name):
    environment = build(name)
    action = np.array([0.2, -0.1, -0.3, 0.0, 0.0, 0.1, -1.0], np.float32)
    traces = []
    for seed in (7, 8, 7):
        environment.reset(Start(seed))
        first = environment.observe()
        for _ in range(5):
            environment.step(action)
        traces.append((first, environment.observe()))
    environment.close()
    (before, after), (other, _), (again, after_again) = traces
    assert before["observation.state"].shape == (9,)
    image = before["observation.images.top"]
    assert (image.shape, image.dtype) == ((128, 128, 3), np.uint8)
    assert image.std() > 5  # A scene, and not one colour.
    np.testing.assert_array_equal(before["observation.state"], again["observation.state"])
    np.testing.assert_allclose(after["observation.state"], after_again["observation.state"], atol=1e-5)
    assert np.abs(image.astype(int) - again["observation.images.top"]).mean() < 0.5
    assert np.abs(image.astype(int) - other["observation.images.top"]).mean() > 0.05


def test_horizons_are_those_of_the_registrations():
    from mani_skill.utils.registration import REGISTERED_ENVS

    for name, known in KNOWN.items():
        assert REGISTERED_ENVS[name].max_episode_steps == known.horizon, name


def test_an_action_of_one_is_a_tenth_of_a_metre_along_the_bases_axes():
    environment = build("PickCube-v1", state="tcp_pose")
    environment.reset(Start(1))
    start = environment.observe()["observation.state"]
    for _ in range(3):  # Small enough for the controller to follow.
        environment.step(np.array([0, 0, 0.1, 0, 0, 0, 1], np.float32))
    for _ in range(10):
        environment.step(environment.actions.idle)
    moved = environment.observe()["observation.state"][:3] - start[:3]
    environment.close()
    assert moved[2] > 0.01
    assert np.abs(moved[:2]).max() < 0.005
