"""The test in closed loop, in a simulator without physics: which setting of an evaluation fails a policy."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from toy_simulator import HORIZON, LineConfig

from rlinf_core.rollout.config import RolloutSettings
from rlinf_core.triage.scene import Simulator
from rlinf_core.triage.tests.closed_loop import ClosedLoopTest, LateAgent


def scene_of(act, minutes=2.0, episodes=8, **env):
    settings = RolloutSettings(env=LineConfig(names=("right",), **env), episodes=episodes, seed=7, processes=1)
    config = SimpleNamespace(chunk_length=lambda: 8)
    policy = SimpleNamespace(act=act, config=config)
    return SimpleNamespace(policy=policy, simulator=Simulator(settings, True, minutes=minutes))


def moving(*moves):
    """A policy whose chunks always are the same."""
    chunk = np.zeros((8, 2), np.float32)
    chunk[:, 0] = moves
    return lambda observations, generators: [chunk for _ in observations]


def cells(outcome):
    return {row[0]: row[1] for row in outcome.tables[0].rows}


def test_a_policy_that_reaches_the_goal_is_fine():
    found = ClosedLoopTest().run(scene_of(moving(*[1.0] * 8), replan=4))
    assert found.verdict == "fine"
    assert "it succeeds in 1" in found.sentence
    table = cells(found)
    assert table.keys() >= {"as configured", "2 executed actions, not 4", "20 settle steps, not 0"}
    assert table["observations 4 actions late"].value == 1


def test_chunks_whose_later_actions_are_wrong_are_executed_too_long():
    found = ClosedLoopTest().run(scene_of(moving(1, *[-0.14] * 7)))
    assert found.verdict == "cause"
    assert "1 executed actions, not 8" in found.sentence
    assert found.way_out == "Set env.replan = 1 (--replan)"
    assert cells(found)["as configured"].value == 0


def test_a_horizon_that_ends_too_early_is_named():
    found = ClosedLoopTest().run(scene_of(moving(*[0.2] * 8), episodes=24, replan=1))
    assert found.verdict == "cause"
    assert "with 1.5 times the horizon" in found.sentence
    assert f"env.horizon = {round(1.5 * HORIZON)}" in found.way_out


@pytest.mark.parametrize("minutes", [0.0, 0.03])
def test_it_ends_in_time(minutes):
    found = ClosedLoopTest().run(scene_of(moving(*[0.0] * 8), minutes, seconds_a_step=0.01))
    if minutes == 0:
        assert found.verdict == "skipped"
        assert "allow more minutes" in found.sentence
    else:
        assert found.verdict in ("suspicious", "skipped")


def test_a_late_agent_executes_what_the_look_before_said():
    chunk = np.arange(8.0)[:, None]
    agent = LateAgent(lambda asking: [chunk + 10 * one.steps for one in asking], 2)
    asking = SimpleNamespace(episode=SimpleNamespace(key=("policy", "right", 0)), steps=0)
    assert agent([asking])[0].ravel().tolist() == [0, 1]
    later = SimpleNamespace(**{**vars(asking), "steps": 2})
    assert agent([later])[0].ravel().tolist() == [2, 3]
    assert agent([SimpleNamespace(**{**vars(asking), "steps": 4})])[0].ravel().tolist() == [22, 23]


def test_without_episodes_it_is_skipped():
    scene = scene_of(moving(*[1.0] * 8))
    scene.simulator = replace(scene.simulator, closed_loop=False)
    assert ClosedLoopTest().run(scene).verdict == "skipped"
