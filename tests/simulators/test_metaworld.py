"""The MetaWorld environment beside the script that recorded the repository's data, and with MetaWorld's own experts."""

import importlib
import json
import os
import sys
from importlib import util
from pathlib import Path

import numpy as np
import pytest

from rlinf_core import Start, UserError
from rlinf_plugins_metaworld.config import MetaworldConfig
from rlinf_plugins_metaworld.tasks import HORIZON, PROMPTS

RECORDED = {"image_size": 224, "shadows": False, "antialiasing": 4, "action_repeat": 4}
"""How `examples/record_metaworld.py` renders."""


@pytest.fixture(scope="module")
def record():
    """The module `examples/record_metaworld.py`."""
    pytest.importorskip("metaworld")
    spec = util.spec_from_file_location("record_metaworld", "examples/record_metaworld.py")
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(name, **settings):
    config = MetaworldConfig(**RECORDED | settings)
    [task] = [one for one in config.tasks() if one.name == name]
    return config.build(task)


def test_the_settings_need_no_simulator(monkeypatch):
    from rlinf_plugins_metaworld import config

    monkeypatch.setattr(config.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"not installed: metaworld, mujoco. Use: pip install 'rlinf-plugins-metaworld"):
        MetaworldConfig().tasks()
    with pytest.raises(ValueError, match="MetaWorld has no task 'reach-v2'"):
        MetaworldConfig(prompts={"reach-v2": "Reach"})


@pytest.mark.parametrize(
    ("platform", "given", "used"), [("linux", "", "egl"), ("linux", "osmesa", "osmesa"), ("darwin", "", None)]
)
def test_the_renderer_needs_no_display_and_is_the_user_s_choice(monkeypatch, platform, given, used):
    """On macOS MuJoCo's own default is right, and EGL does not exist."""
    pytest.importorskip("metaworld")
    monkeypatch.setenv("MUJOCO_GL", given)
    if not given:
        monkeypatch.delenv("MUJOCO_GL")
    from rlinf_plugins_metaworld import environment

    with monkeypatch.context() as patch:
        patch.setattr(sys, "platform", platform)
        importlib.reload(environment)
    assert os.environ.get("MUJOCO_GL") == used


def test_instructions_are_those_of_lerobot():
    lerobot = util.find_spec("lerobot")
    if lerobot is None:
        pytest.skip("needs lerobot")
    config = json.loads((Path(lerobot.origin).parent / "envs" / "metaworld_config.json").read_text())
    assert config["TASK_DESCRIPTIONS"] == PROMPTS
    assert sorted(PROMPTS, key=config["TASK_NAME_TO_ID"].get) == [*PROMPTS]


@pytest.mark.slow
def test_observations_are_those_of_the_recording_to_the_bit(record):
    for name, prompt in record.TASKS.items():
        environment, expected = build(name), record.make_env(name)
        renderer = record.make_renderer(expected)
        for seed in (100_000, 5):
            environment.reset(Start(seed))
            seen, observation = environment.observe(), record.reset(expected, seed)
            assert np.array_equal(seen["observation.image"], record.render(expected, renderer))
            assert np.array_equal(seen["observation.state"], record.state(observation))
            action = np.float32([2.0, -0.5, -0.3, 1.0])  # Clipped alike.
            for _ in range(4):
                environment.step(action)
            observation, _ = record.step_held(expected, action)
            seen = environment.observe()
            assert np.array_equal(seen["observation.image"], record.render(expected, renderer))
            assert np.array_equal(seen["observation.state"], record.state(observation))
        assert PROMPTS[name] == prompt
        renderer.close()
        environment.close()


@pytest.mark.slow
def test_experts_succeed_and_doing_nothing_does_not(record):
    """MetaWorld's own experts, who see the whole state, through this environment: the success is MetaWorld's."""
    for name in ("reach-v3", "push-v3", "drawer-open-v3", "door-lock-v3"):
        environment = build(name)
        expert = record.ENV_POLICY_MAP[name]()
        for seed in (7, 8):
            environment.reset(Start(seed))
            whole = environment._env._get_obs()
            solved = 0
            for _ in range(HORIZON):
                outcome = environment.step(np.float32(np.clip(expert.get_action(whole), -1, 1)))
                whole = environment._env._get_obs()
                solved += outcome.success
                if solved > 40:
                    break
            assert solved > 40
            environment.reset(Start(seed))
            outcomes = [environment.step(environment.actions.idle) for _ in range(HORIZON)]
            assert not any(one.success for one in outcomes)
            assert [one.ended for one in outcomes] == [False] * (HORIZON - 1) + [True]
        environment.close()


def walk(environment):
    """The hand's path under ten actions, and the rewards, which depend on objects and goal."""
    actions = np.random.default_rng(0).uniform(-1, 1, (10, 4)).astype(np.float32)
    rewards = [environment.step(action).reward for action in actions]
    return [*environment.observe()["observation.state"].tolist(), *rewards]


@pytest.mark.slow
@pytest.mark.parametrize("name", PROMPTS)
def test_every_task_can_be_built_reset_rendered_and_stepped(name):
    pytest.importorskip("metaworld")
    environment = build(name, image_size=64, shadows=True)
    environment.reset(Start(1))
    first = environment.observe()
    path = walk(environment)
    environment.reset(Start(2))
    other = environment.observe()
    environment.reset(Start(1))
    again = environment.observe()
    assert np.array_equal(first["observation.image"], again["observation.image"])
    # Nothing is left of the episodes before: Farama-Foundation/Metaworld#385, huggingface/lerobot#3727.
    assert np.array_equal(walk(environment), path)
    assert not np.array_equal(first["observation.image"], other["observation.image"])
    assert first["observation.image"].std() > 5
    assert first["observation.state"].shape == (4,)
    environment.close()
