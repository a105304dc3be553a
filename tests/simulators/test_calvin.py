"""CALVIN without the simulator, which is on no package index: on observations of the structure that its code documents.

`calvin_env`'s `PlayTableSimEnv.get_obs`: `rgb_obs` with `rgb_static` [200, 200, 3] and `rgb_gripper` [84, 84, 3], and
`robot_obs` [15] (position, Euler angles, opening of the gripper, seven joints, the gripper's last action). Its robot
asserts that the gripper's action is -1 or 1, and scales an action in place.
"""

import sys
import types
from collections import Counter

import numpy as np
import pytest

from rlinf_core import EpisodeError, Start, UserError
from rlinf_plugins_calvin import config as module
from rlinf_plugins_calvin.config import SETTINGS, CalvinConfig
from rlinf_plugins_calvin.tasks import PROMPTS, initial_states

ROBOT = np.array([0.03, -0.23, 0.57, 3.09, -0.03, 1.5, 0.08, -1.2, 1.0, 2.1, -2.3, -0.9, 1.6, 0.6, 1.0])


class Simulator:
    """`PlayTableSimEnv`, as far as it is used."""

    def __init__(self):
        self.states, self.actions, self.closed, self.robot = [], [], False, ROBOT

    def reset(self, robot_obs=None, scene_obs=None):
        self.states.append((robot_obs, scene_obs))
        return self.get_obs()

    def get_obs(self):
        static, gripper = np.full((200, 200, 3), 10, np.uint8), np.full((84, 84, 3), 20, np.uint8)
        return {"rgb_obs": {"rgb_static": static, "rgb_gripper": gripper}, "depth_obs": {}, "robot_obs": self.robot}

    def get_info(self):
        return {"scene_info": {"drawer": len(self.actions)}}

    def step(self, action):
        assert action[-1] in (-1, 1)
        self.actions.append(action.copy())
        action[:3] *= 0.02
        return self.get_obs(), 0, False, self.get_info()

    def close(self):
        self.closed = True


class Oracle:
    """The benchmark's judge: the drawer is open after two steps."""

    def get_task_info_for_set(self, before, after, tasks):
        return tasks if after["scene_info"]["drawer"] - before["scene_info"]["drawer"] >= 2 else set()


@pytest.fixture
def calvin(tmp_path, monkeypatch):
    """CALVIN's packages, installed from files as a checkout has them; returns the simulators that were made."""
    made = []

    def get_env(folder, show_gui):
        made.append(Simulator())
        return made[-1]

    packages = {
        "calvin_env/__init__.py": "",
        "calvin_env/envs/__init__.py": "",
        "calvin_env/envs/play_table_env.py": "get_env = None\n",
        "calvin_env/envs/tasks.py": "",
        "calvin_agent/__init__.py": "",
        "calvin_agent/evaluation/__init__.py": "",
        "calvin_agent/evaluation/utils.py": (
            "def get_env_state_for_initial_condition(state):\n    return dict(state), 'scene'\n"
        ),
        "conf/callbacks/rollout/tasks/new_playtable_tasks.yaml": "_target_: calvin_env.envs.tasks.Tasks\n",
        f"data/validation/{SETTINGS}": "env:\n  _target_: calvin_env.envs.play_table_env.PlayTableSimEnv\n",
    }
    for name, text in packages.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    hydra = types.SimpleNamespace(utils=types.SimpleNamespace(instantiate=lambda table: Oracle()))
    monkeypatch.setitem(sys.modules, "hydra", hydra)
    omegaconf = types.SimpleNamespace(OmegaConf=types.SimpleNamespace(load=lambda path: {}))
    monkeypatch.setitem(sys.modules, "omegaconf", omegaconf)
    import calvin_env.envs.play_table_env as play_table_env

    monkeypatch.setattr(play_table_env, "get_env", get_env)
    yield made
    for name in [name for name in sys.modules if name.partition(".")[0] in ("calvin_env", "calvin_agent")]:
        del sys.modules[name]


def build(tmp_path, task="open_drawer"):
    config = CalvinConfig(dataset=str(tmp_path / "data" / "validation"))
    [chosen] = [one for one in config.tasks() if one.name == task]
    return config.build(chosen)


def test_without_the_simulator_one_message_says_where_it_is():
    for call in (CalvinConfig().tasks, lambda: CalvinConfig().build(None)):
        with pytest.raises(
            UserError, match=r"calvin_env and calvin_agent cannot be imported: it is on no package index"
        ):
            call()


def test_the_initial_states_are_the_benchmarks():
    assert len(PROMPTS) == 27
    everything = {str(sorted(state.items())) for task in PROMPTS for state in initial_states(task)}
    assert len(everything) == 192  # The number that the benchmark's own enumeration has.
    for task in PROMPTS:
        for state in initial_states(task):
            blocks = Counter(state[f"{color}_block"] for color in ("red", "blue", "pink"))
            assert blocks["table"] in (1, 2)
            assert max(blocks["slider_left"], blocks["slider_right"]) <= 1
            assert state["grasped"] == 0
    assert {state["drawer"] for state in initial_states("open_drawer")} == {"closed"}
    assert {state["red_block"] for state in initial_states("push_red_block_left")} == {"table"}
    seen = {(state["pink_block"], state["slider"]) for state in initial_states("lift_pink_block_slider")}
    assert seen == {("slider_left", "right"), ("slider_right", "left")}  # The door is in front of the other side.
    assert initial_states("turn_on_led") == initial_states.__wrapped__("turn_on_led")


def test_observations_are_rows_of_rlinfs_calvin_data(tmp_path, calvin):
    from rlinf_plugins_openpi.datasets.calvin import Pi0CalvinConfig

    environment = build(tmp_path)
    environment.reset(Start(3))
    seen = environment.observe()
    data = Pi0CalvinConfig()
    assert seen.keys() == {*data.images.values(), *data.state}
    np.testing.assert_array_equal(np.concatenate([seen[name] for name in data.state]), ROBOT[:7].astype(np.float32))
    assert (seen["video.image_base"].shape, seen["video.image_wrist"].shape) == ((200, 200, 3), (84, 84, 3))
    assert len(environment.actions.idle) == data.action_width
    assert (environment.frame() == 10).all()
    environment.close()
    assert calvin[0].closed


def test_an_episode_follows_from_its_start(tmp_path, calvin):
    environment = build(tmp_path)
    states = initial_states("open_drawer")
    for start in (Start(5), Start(5, 2), Start(len(states) + 5)):
        environment.reset(start)
    robots = [robot for robot, _ in calvin[0].states]
    assert robots == [dict(states[5]), dict(states[2]), dict(states[5])]


def test_the_gripper_opens_or_closes_and_the_policys_action_stays_as_it_is(tmp_path, calvin):
    environment = build(tmp_path)
    environment.reset(Start(1))
    for given, expected in ((0.3, 1), (-0.2, -1), (0.0, -1)):
        action = np.float32([0.5, -0.25, 0, 0, 0, 1, given])
        copy = action.copy()
        environment.step(action)
        np.testing.assert_array_equal(action, copy)
        np.testing.assert_allclose(calvin[0].actions[-1], [*copy[:6], expected])


def test_success_is_the_benchmarks_since_the_reset(tmp_path, calvin):
    environment = build(tmp_path)
    environment.reset(Start(1))
    assert [environment.step(environment.actions.idle).success for _ in range(3)] == [False, True, True]
    environment.reset(Start(2))
    assert not environment.step(environment.actions.idle).success
    with pytest.raises(EpisodeError, match="NaN"):
        environment.step(np.full(7, np.inf, np.float32))
    calvin[0].robot = ROBOT * np.nan
    with pytest.raises(EpisodeError, match="unstable"):
        environment.step(environment.actions.idle)


def test_missing_settings_and_a_renderer_that_does_not_start_are_one_message(tmp_path, calvin, monkeypatch):
    with pytest.raises(UserError, match=r"env\.dataset is not set: name a folder of CALVIN's dataset"):
        CalvinConfig().settings_folder()
    with pytest.raises(UserError, match=r"has no .hydra/merged_config.yaml"):
        CalvinConfig(dataset=str(tmp_path)).settings_folder()

    def leave(folder, show_gui):
        sys.exit("Plugin Failed to load!")  # As `get_env` does without EGL.

    monkeypatch.setattr(sys.modules["calvin_env.envs.play_table_env"], "get_env", leave)
    with pytest.raises(UserError, match=r"CALVIN does not start with .*Plugin Failed to load!"):
        build(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "env: {_target_: os.system}",
        "cameras: [{_target_: subprocess.Popen}]",
        "env: {_target_: calvin_env.envs.play_table_env.os.system}",  # What a module imports is not its own.
        "env: {_target_: calvin_env}",
        "a: !!python/object/apply:os.system [ls]",
        "[",
        "\x00",
    ],
)
def test_settings_run_no_other_code(tmp_path, calvin, text):
    (tmp_path / "data" / "validation" / SETTINGS).write_text(text)
    with pytest.raises(UserError, match=r"its code would be run|cannot be read"):
        build(tmp_path)
    assert not calvin


def test_facts_are_what_is_known(monkeypatch):
    assert CalvinConfig().facts() == {}
    monkeypatch.setattr(module.metadata, "version", lambda name: "3.2.6")
    assert CalvinConfig().facts()["pybullet"] == "3.2.6"
