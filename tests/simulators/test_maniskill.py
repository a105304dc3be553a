"""ManiSkill without the simulator: settings, messages, and the environment on observations of its structure.

Shapes, dtypes and keys are those that `mani_skill` 3.0.1 gave for `PickCube-v1` on a CPU; `test_maniskill_simulator.py`
compares them with the simulator, where it is installed.
"""

import sys
import types

import numpy as np
import pytest
import torch

from rlinf_core import EpisodeError, Start, UserError
from rlinf_plugins_maniskill import config as module
from rlinf_plugins_maniskill.config import ManiskillConfig
from rlinf_plugins_maniskill.tasks import KNOWN

SIZE = 32


class Simulator:
    """What `gymnasium.make` returns: batches of one, in torch."""

    def __init__(self, **options):
        self.options, self.rendered, self.resets, self.closed = options, 0, [], False
        self.unwrapped, self.control_freq = self, 20
        self._sensors = {"base_camera": None, "hand_camera": None}
        low = np.full(7, -1.0, np.float32)
        self.action_space = types.SimpleNamespace(low=low, high=-low, shape=(7,))
        self.qpos = torch.arange(9, dtype=torch.float32)[None] / 10
        robot = types.SimpleNamespace(get_qpos=lambda: self.qpos)
        pose = types.SimpleNamespace(raw_pose=torch.tensor([[0.6, 0.0, 0.2, 0.0, 1.0, 0.0, 0.0]]))
        self.agent = types.SimpleNamespace(robot=robot, tcp=types.SimpleNamespace(pose=pose))

    def get_obs(self, info=None, unflattened=False):
        self.rendered += 1
        image = torch.full((1, SIZE, SIZE, 3), self.rendered, dtype=torch.uint8)
        return {"sensor_data": {name: {"rgb": image + number} for number, name in enumerate(self._sensors)}}

    def reset(self, seed=None, options=None):
        self.resets.append((seed, options))
        return self.get_obs(), {}

    def step(self, action):
        self.action = action
        self.get_obs()
        info = {"success": torch.tensor([bool(action[0] > 0)]), "elapsed_steps": torch.tensor([1])}
        return {}, torch.tensor([0.25]), torch.tensor([False]), torch.tensor([bool(action[1] > 0)]), info

    def close(self):
        self.closed = True


@pytest.fixture
def made(monkeypatch):
    """The simulators that were made; `gymnasium`, `mani_skill` and `sapien` are there."""
    made = []

    def make(name, **options):
        made.append(Simulator(name=name, **options))
        return made[-1]

    for name in ("mani_skill", "mani_skill.envs"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "gymnasium", types.SimpleNamespace(make=make))
    monkeypatch.setattr(module.util, "find_spec", lambda name: name)
    return made


def build(**settings):
    config = ManiskillConfig(**settings)
    return config.build(config.tasks()[0])


def test_without_the_simulator_one_message_says_what_to_install(monkeypatch):
    monkeypatch.setattr(module.util, "find_spec", lambda name: None)
    for call in (ManiskillConfig().tasks, lambda: ManiskillConfig().build(None)):
        with pytest.raises(UserError, match=r"not installed: mani_skill, sapien. Use: pip install 'rlinf-plugins-mani"):
            call()


def test_tasks_are_the_known_ones_and_those_of_the_settings(made):
    tasks = ManiskillConfig(prompts={"PickCube-v1": "grasp it", "MyTask-v1": "do it"}, horizon=80).tasks()
    assert len(tasks) == len(KNOWN) + 1
    assert (tasks[0].prompt, tasks[0].horizon) == ("grasp it", 50)
    assert (tasks[-1].name, tasks[-1].prompt, tasks[-1].horizon) == ("MyTask-v1", "do it", 80)
    with pytest.raises(ValueError, match="the length of MyTask-v1 is not known: set horizon"):
        ManiskillConfig(prompts={"MyTask-v1": "do it"})
    with pytest.raises(ValueError, match="name them in prompts"):
        ManiskillConfig(package="my_tasks")


def test_observations_are_rows_of_rlinfs_maniskill_data(made):
    from rlinf_plugins_openpi.datasets.maniskill import Pi0ManiskillConfig

    environment = build(image_size=SIZE)
    environment.reset(Start(7))
    seen = environment.observe()
    data = Pi0ManiskillConfig()
    assert seen.keys() == {*data.images.values(), *data.state}
    image, state = seen["observation.images.top"], seen["observation.state"]
    assert (image.shape, image.dtype, state.shape, state.dtype) == ((SIZE, SIZE, 3), np.uint8, (9,), np.float32)
    assert environment.actions.low.shape == (data.action_width,)
    assert environment.actions.idle.tolist() == [0] * 6 + [1]  # Nothing moves, and the gripper stays open.
    assert environment.control_hz == 20
    [options] = [one.options for one in made]
    assert (options["control_mode"], options["num_envs"]) == ("pd_ee_delta_pose", 1)
    assert options["sensor_configs"]["width"] == SIZE


def test_states_and_cameras_are_those_of_the_settings(made):
    seen = build(state="tcp_pose", wrist_camera="hand_camera", robot="panda_wristcam")
    seen.reset(Start(1))
    row = seen.observe()
    np.testing.assert_array_equal(row["observation.state"], np.float32([0.6, 0, 0.2, 0, 1, 0, 0]))
    assert (row["observation.images.wrist"] == row["observation.images.top"] + 1).all()
    assert made[0].options["robot_uids"] == "panda_wristcam"
    with pytest.raises(UserError, match=r"PickCube-v1 has no camera 'top' \(it has base_camera, hand_camera\)"):
        build(camera="top")
    assert made[1].closed


def test_it_renders_once_when_the_policy_looks_and_never_in_a_step(made):
    environment = build()
    environment.reset(Start(1))
    for _ in range(5):
        environment.step(np.zeros(7, np.float32))
    assert made[0].rendered == 0
    environment.observe()
    environment.frame()
    assert made[0].rendered == 1
    environment.step(np.zeros(7, np.float32))
    environment.observe()
    assert made[0].rendered == 2


def test_an_episode_follows_from_its_seed_and_the_scene_is_built_again(made):
    environment = build()
    environment.reset(Start(2**32 + 5))
    assert made[0].resets == [(5, {"reconfigure": True})]


def test_success_end_and_faults_are_those_of_the_simulator(made):
    environment = build()
    environment.reset(Start(1))
    idle = np.zeros(7, np.float32)
    assert environment.step(idle) == (False, False, 0.25)
    assert environment.step(np.float32([1, 0, 0, 0, 0, 0, 0])).success
    assert environment.step(np.float32([0, 1, 0, 0, 0, 0, 0])).ended
    with pytest.raises(EpisodeError, match="NaN or infinity"):
        environment.step(np.full(7, np.nan, np.float32))
    made[0].qpos = made[0].qpos * torch.nan
    with pytest.raises(EpisodeError, match="unstable"):
        environment.step(idle)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("failed to find a rendering device"), "lavapipe of version 24.3 or later"),
        (RuntimeError('Failed to find a supported physical device "cpu"'), "cannot render here"),
        (RuntimeError("vk::createInstanceUnique: ErrorIncompatibleDriver"), "VK_ICD_FILENAMES"),
        (KeyError("pd_ee_delta"), "control_mode = 'pd_ee_delta_pose'"),
        (AssertionError(), "AssertionError"),
    ],
)
def test_what_cannot_be_made_is_one_message(made, monkeypatch, error, said):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(sys.modules["gymnasium"], "make", fail)
    with pytest.raises(UserError, match=r"^ManiSkill cannot") as caught:
        build()
    assert said in str(caught.value)
    with pytest.raises(UserError, match="package = 'none_such' of the environment maniskill cannot be imported"):
        build(package="none_such", prompts={"A-v1": "a"}, horizon=1)
