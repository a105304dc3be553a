"""Environments of Gymnasium: PushT and ALOHA with their own datasets' columns, and any other id by settings."""

import numpy as np
import pytest

from rlinf_core import Start, UserError
from rlinf_plugins_gymnasium.config import GymnasiumConfig

gymnasium = pytest.importorskip("gymnasium")


def build(name, **settings):
    config = GymnasiumConfig(**settings)
    [task] = [one for one in config.tasks() if one.name == name]
    return config.build(task), task


class Corridor(gymnasium.Env):
    """An environment that this project does not know: its observation is a vector, its success a reward."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 25}
    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (1,))
    action_space = gymnasium.spaces.Box(-np.inf, np.inf, (1,))

    def __init__(self, render_mode=None, length=3.0):
        self.length = length

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x = self.np_random.uniform(0, 1, 1)
        return self.x.copy(), {}

    def step(self, action):
        self.x = self.x + action
        done = bool(self.x[0] > self.length)
        return self.x.copy(), float(done), done, False, {}

    def render(self):
        return np.full((8, 8, 3), 7, np.uint8)


gymnasium.register("Corridor-v0", Corridor, max_episode_steps=50)


def test_another_id_needs_settings_only():
    settings = {
        "ids": ("Corridor-v0",),
        "options": {"length": 2.0},
        "observation": {"": "observation.state", "render": "observation.image"},
        "prompt": "go",
        "reward_of_success": 1.0,
    }
    environment, task = build("Corridor-v0", **settings)
    assert (task.prompt, task.horizon, environment.control_hz) == ("go", 50, 25.0)
    environment.reset(Start(4))
    seen = environment.observe()
    assert (seen["observation.state"].dtype, seen["observation.image"].dtype) == (np.float32, np.uint8)
    assert (environment.actions.low, environment.actions.high, environment.actions.idle) == (-1, 1, 0)
    outcomes = [environment.step(np.float32([0.9])) for _ in range(3)]
    assert [one.success for one in outcomes] == [one.ended for one in outcomes]
    assert outcomes[-1].success
    environment, _ = build("Corridor-v0", **settings | {"reward_of_success": None})
    environment.reset(Start(4))
    with pytest.raises(UserError, match=r"info has no 'is_success' \(it has nothing\): set `success`"):
        environment.step(np.float32([0.9]))
    environment, _ = build("Corridor-v0", **settings | {"observation": {"pixels/top": "image"}})
    environment.reset(Start(4))
    with pytest.raises(UserError, match=r"its observation has no 'pixels/top': there is an array \(1,\)"):
        environment.observe()


def test_what_cannot_be_known_is_asked_for():
    with pytest.raises(ValueError, match="ids need `observation`"):
        GymnasiumConfig(ids=("Corridor-v0",))
    with pytest.raises(ValueError, match="needs no settings"):
        GymnasiumConfig(ids=("gym_pusht/PushT-v0",), observation={"a": "b"})
    settings = {"observation": {"": "observation.state"}}
    with pytest.raises(UserError, match="environment 'Corridor-v9' cannot be found"):
        GymnasiumConfig(ids=("Corridor-v9",), **settings).tasks()
    with pytest.raises(UserError, match="cannot be found: No module named 'gym_nowhere'"):
        GymnasiumConfig(ids=("gym_nowhere/A-v0",), package="gym_nowhere", **settings).tasks()
    gymnasium.register("Endless-v0", Corridor)
    with pytest.raises(UserError, match="has no time limit of its own: set `horizon`"):
        GymnasiumConfig(ids=("Endless-v0",), **settings).tasks()
    gymnasium.register(
        "Buttons-v0", lambda **_: type("B", (Corridor,), {"action_space": gymnasium.spaces.Discrete(2)})()
    )
    config = GymnasiumConfig(ids=("Buttons-v0",), horizon=9, **settings)
    with pytest.raises(UserError, match="policies of robots act with one vector"):
        config.build(config.tasks()[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["gym_pusht/PushT-v0", "gym_aloha/AlohaInsertion-v0", "gym_aloha/AlohaTransferCube-v0"]
)
def test_known_environments_observe_what_their_datasets_record(name):
    aloha = "aloha" in name
    pytest.importorskip("gym_aloha" if aloha else "gym_pusht")
    environment, _ = build(name)
    environment.reset(Start(3))
    seen = environment.observe()
    image = seen["observation.images.top" if aloha else "observation.image"]
    assert (image.shape, image.dtype) == ((480, 640, 3) if aloha else (96, 96, 3), np.uint8)
    width = 14 if aloha else 2
    assert seen["observation.state"].shape == environment.actions.idle.shape == (width,)
    assert environment.control_hz == (50.0 if aloha else 10.0)
    outcomes = [environment.step(environment.actions.idle) for _ in range(20)]
    assert not any(one.success or one.ended for one in outcomes)
    still = environment.observe()["observation.state"]
    assert np.abs(still - seen["observation.state"]).max() < (0.1 if aloha else 5.0)  # Radians (the arms sag), pixels.
    environment.reset(Start(4))
    other = environment.observe()
    environment.reset(Start(3))
    again = environment.observe()
    column = "observation.images.top" if aloha else "observation.image"
    assert np.array_equal(again[column], image)
    assert not np.array_equal(other[column], image)
    assert environment.frame().dtype == np.uint8
    environment.close()
