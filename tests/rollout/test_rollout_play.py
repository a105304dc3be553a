"""Rollouts in the toy simulator: what is counted, in whichever process, and what becomes of faults."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest
from toy_simulator import HORIZON, PROMPT, LineConfig

from rlinf_core import PluginError, UserError
from rlinf_core.results import wilson_interval
from rlinf_core.rollout.agents import PolicyAgent, Replay, build_baselines
from rlinf_core.rollout.config import RolloutSettings
from rlinf_core.rollout.episodes import EpisodesFile, in_order, plan_episodes
from rlinf_core.rollout.play import play
from rlinf_core.rollout.pool import Pool, episodes_left
from rlinf_core.rollout.tables import metrics_of, success_table

RIGHT = np.tile(np.float32([1, 0]), (8, 1))


def settings(fault="", **fields):
    own = {key: fields.pop(key) for key in [*fields] if key in LineConfig.model_fields}
    defaults = {"processes": 2, "episodes": 3, "seed": 7, "timeout_seconds": 30.0, "videos": 0}
    return RolloutSettings(env=LineConfig(fault=fault, **own), **defaults | fields)


def to_the_right(observations, generators):
    """The whole way, step by step, then nothing."""
    for one in observations:
        assert one.keys() == {"point", "image", "task"}
        assert one["task"] == PROMPT
    return [RIGHT if one["point"][0] < 0.95 else np.zeros_like(RIGHT) for one in observations]


def played(config, act=to_the_right, agents=None, **options):
    agents = agents or {"policy": PolicyAgent(act, config.env.replan)}
    planned = plan_episodes(agents, config.chosen_tasks(), config.episodes, config.seed)
    found = []
    play(config, planned, agents, finished=found.append, **options)
    return in_order(found, planned)


def without_times(results):
    return [one.model_copy(update={"seconds": 0.0, "video": ""}) for one in results]


def start_of(seed):
    return float(np.random.default_rng(seed).uniform(-0.5, 0.5))


def test_episodes_follow_from_their_seeds_in_any_number_of_processes():
    one, three = (without_times(played(settings(processes=processes, replan=2))) for processes in (1, 3))
    assert one == three
    assert [(o.task, o.number, o.seed) for o in one[:3]] == [("right", 0, 7), ("right again", 0, 7), ("right", 1, 8)]
    for result in one:
        assert (result.ever, result.success) == (True, True)
        assert result.steps == result.first_success == int(np.ceil(np.round((0.95 - start_of(result.seed)) / 0.1, 9)))
        assert result.best_reward == pytest.approx(min(1.0, start_of(result.seed) + 0.1 * result.steps))


def test_a_chunk_is_cut_at_the_replanning_interval_and_each_action_repeated():
    looks = []

    def act(observations, generators):
        looks.extend(int(one["point"][1]) for one in observations)
        return to_the_right(observations, generators)

    config = settings(processes=1, episodes=1, tasks=(0,), replan=3, action_repeat=2)
    [result] = played(config, act)
    assert looks == [*range(0, result.steps, 6)]


def test_success_at_the_end_differs_from_success_ever():
    """It runs past the goal: solved for two steps, and no longer three steps after the first."""
    config = settings(episodes=1, tasks=(0,), after_success=5)
    [result] = played(config, lambda seen, _: [RIGHT for _ in seen])
    assert (result.ever, result.success, result.steps) == (True, False, result.first_success + 5)
    table = success_table(config, [result])
    assert dict(zip(table.columns, table.rows[0], strict=True))["at the end"].value == 0.0


def test_an_episode_ends_at_its_horizon_and_settling_is_not_counted():
    [result] = played(settings(episodes=1, tasks=(0,), settle_steps=5), lambda seen, _: [0 * RIGHT for _ in seen])
    assert (result.ever, result.steps) == (False, HORIZON)
    [result] = played(settings(episodes=1, tasks=(0,), horizon=11), lambda seen, _: [0 * RIGHT for _ in seen])
    assert result.steps == 11


def test_recorded_initial_states_are_used_in_turn():
    results = played(settings(episodes=3, tasks=("right",), states=2))
    assert [one.initial_state for one in results] == [0, 1, 0]
    assert [one.steps for one in results] == [10, 11, 10]


def test_all_that_ask_can_be_answered_as_one_batch_of_rows_of_the_dataset():
    config = settings(processes=3, episodes=6, columns={"point": "state", "image": "camera"})
    with Pool(config, plan_episodes(["policy"], config.chosen_tasks(), 6, 1), looks=lambda name: True) as pool:
        asking = []
        while len(asking) < 3:
            asking += pool.asking()
        assert pool.asking() == []  # Nothing to wait for: all of them ask.
    assert [one.observation.keys() for one in asking] == [{"state", "camera", "task"}] * 3
    draws = {one.episode.key: one.generator.standard_normal() for one in asking}
    assert len(set(draws.values())) == 3


def test_baselines_show_what_luck_gives():
    config = settings(episodes=4, tasks=(0,))
    demonstrations = {PROMPT: [np.tile(np.float32([1, 0]), (12, 1)), np.zeros((3, 2), np.float32)]}
    agents = build_baselines(["idle", "random", "replay"], config.env, demonstrations)
    results = played(config, agents=agents)
    rates = metrics_of(results)
    assert rates["success_idle"] == 0.0
    assert 0.25 <= rates["success_replay"] <= 0.5  # Every other demonstration does nothing.
    table = success_table(config, results)
    assert table.columns == ("task", "success", "idle action", "random actions", "blind replay", *table.columns[-3:])
    assert table.rows[0][2] == wilson_interval(0, 4)
    assert not any(agent.looks for agent in agents.values())


def test_a_replay_repeats_the_demonstration_whatever_the_chunks():
    """Action i of the demonstration is executed at decision i, then the point stays."""
    config = settings(episodes=1, tasks=(0,), action_repeat=2)
    actions = np.zeros((70, 2), np.float32)
    actions[::7, 0] = 0.5
    agents = {"replay": Replay({PROMPT: [actions]}, config.env.model_copy(update={"horizon": 200}))}
    config = config.model_copy(update={"env": config.env.model_copy(update={"horizon": 200})})
    [result] = played(config, agents=agents)
    assert result.best_reward == pytest.approx(min(1.0, start_of(7) + 0.1 * 10), abs=0.11)


def test_videos_of_a_success_and_of_a_failure_are_kept(tmp_path):
    def act(observations, generators):
        return [RIGHT if one["point"][0] > 0.0 else 0 * RIGHT for one in observations]

    config = settings(episodes=6, tasks=(0,), videos=1, replan=2, seed=1)
    results = played(config, act, folder=tmp_path)
    kept = [one for one in results if one.video]
    assert sorted(one.ever for one in kept) == [False, True]
    assert {f"videos/{path.name}" for path in (tmp_path / "videos").iterdir()} == {one.video for one in kept}
    for one in kept:
        with av.open(str(tmp_path / one.video)) as video:
            assert video.streams.video[0].average_rate == 10
            frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
        assert frames[0].shape == (16, 24, 3)
        assert len(frames) == -(-one.steps // 2) + 1  # Whenever the policy looks, and the end.


FAULTS = {
    "raise:step": r"step\(\) failed: ValueError: the point is lost",
    "raise:observe": r"observe\(\) failed: ValueError",
    "user:build": r"build\(\) failed: the line is not installed: pip install line",
    # As EGL does with several renderers on one GPU: google-deepmind/mujoco#3444, RLinf/RLinf#892.
    "hang:observe": r"no answer for 2 s \(timeout_seconds\)",
    "exit:step": r"its process ended, code 3; the end of its output:\nline: fatal: out of memory",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_ends_the_evaluation_and_names_environment_task_and_episode(fault):
    config = settings(fault, episodes=1, tasks=(0,), timeout_seconds=2.0 if "hang" in fault else 30.0)
    name = r"environment 'line', task 'right', episode 0 of policy \(seed 7\): "
    with pytest.raises(PluginError, match=name + FAULTS[fault]):
        played(config)


@pytest.mark.parametrize("place", ["reset", "step"])
def test_only_an_episode_that_the_environment_gives_up_counts_as_failed(place):
    config = settings(f"fail:{place}", episodes=2, tasks=(0,))
    results = played(config)
    assert [one.failure for one in results] == ["the point is unstable"] * 2
    assert not any(one.ever for one in results)
    assert "2 episodes could not be finished" in success_table(config, results).note


def test_actions_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match=r"are \[8, 7\], but it takes actions of 2 numbers.*another robot"):
        played(settings(episodes=1), lambda seen, _: [np.zeros((8, 7)) for _ in seen])
    with pytest.raises(UserError, match=r"task 'right', episode 0 .* contains NaN"):
        played(settings(episodes=1, processes=1), lambda seen, _: [np.full((8, 2), np.nan) for _ in seen])


def test_finished_episodes_are_kept_and_a_second_start_plays_the_others(tmp_path):
    config = settings(episodes=4, processes=1)
    planned = plan_episodes(["policy"], config.chosen_tasks(), 4, 7)
    agents = {"policy": PolicyAgent(to_the_right, 0)}
    path, identity = tmp_path / "episodes.jsonl", config.identity()
    file = EpisodesFile(path, identity)

    def interrupt(result):
        file.add(result)
        if len(file.results) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        play(config, planned, agents, finished=interrupt)
    with path.open("a") as torn:
        torn.write('{"agent": "pol')  # Killed while it wrote.
    file = EpisodesFile(path, identity)
    left = episodes_left(planned, file.results)
    assert (len(file.results), len(left)) == (3, 5)
    play(config, left, agents, finished=file.add)
    whole = in_order(EpisodesFile(path, identity).results.values(), planned)
    assert without_times(whole) == without_times(played(config))
    with pytest.raises(UserError, match=r"episodes\.jsonl has episodes of another evaluation \(seed was 7, now 8\)"):
        EpisodesFile(path, identity | {"seed": 8})


@pytest.mark.parametrize("content", ["", "[]\n", '{"evaluation": 1}\n{"agent": 5}\n', "\0\1\n", '{"a": 1}\n'])
def test_a_damaged_episodes_file_is_named(tmp_path, content):
    (tmp_path / "episodes.jsonl").write_text(content)
    with pytest.raises(UserError, match=r"episodes\.jsonl"):
        EpisodesFile(tmp_path / "episodes.jsonl", {"seed": 1})


def test_processes_end_with_the_pool_also_while_they_hang():
    config = settings("hang:step", episodes=1, processes=2)
    with Pool(config, plan_episodes(["policy"], config.chosen_tasks(), 1, 1), looks=lambda name: True) as pool:
        ids = [one.process.pid for one in pool._processes]
    for one in ids:
        with pytest.raises(ProcessLookupError):
            os.kill(one, 0)


def test_a_process_ends_when_its_parent_is_killed():
    """A hanging simulator, too: nothing is left behind by a killed job."""
    code = (
        "import os, sys, time\n"
        "from toy_simulator import LineConfig\n"
        "from rlinf_core.rollout.config import RolloutSettings\n"
        "from rlinf_core.rollout.episodes import plan_episodes\n"
        "from rlinf_core.rollout.pool import Pool\n"
        "config = RolloutSettings(env=LineConfig(fault='hang:reset'), processes=1)\n"
        "pool = Pool(config, plan_episodes(['policy'], config.chosen_tasks(), 1, 1), looks=lambda name: True)\n"
        "pool.__enter__()\n"
        "print(pool._processes[0].process.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment) as parent:
        worker = int(parent.stdout.readline())
        parent.send_signal(signal.SIGKILL)
    until = time.monotonic() + 30
    while time.monotonic() < until:
        try:
            state = Path(f"/proc/{worker}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except FileNotFoundError:
            return
        if state == "Z":  # Whoever adopted it has not read its exit code.
            return
        time.sleep(0.1)
    raise AssertionError("the process of the environment still runs")


def test_environments_load_no_torch():
    code = "import sys, rlinf_core.rollout.worker; print({'torch', 'pluggy', 'av'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_unknown_tasks_are_named_together_with_those_that_exist():
    with pytest.raises(UserError, match=r"has no task 'rihgt'; did you mean 'right'.* and no task 9 .*right again"):
        settings(tasks=("rihgt", 9)).chosen_tasks()
    assert [task.name for task in settings(tasks=("1", "right")).chosen_tasks()] == ["right again", "right"]


def test_a_rate_that_differs_from_the_data_is_reported_once():
    said = []
    played(settings(episodes=2), step_seconds=0.1, warn=said.append)
    assert len(said) == 1
    assert said[0].endswith(
        "20 actions per second (20 control steps, action_repeat 1), but the training data have 10: "
        "set env.action_repeat to 2"
    )
    played(settings(episodes=1, action_repeat=2), step_seconds=0.1, warn=said.append)
    assert len(said) == 1
