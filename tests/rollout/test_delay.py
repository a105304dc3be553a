"""What a robot executes while its policy computes, and how uneven that is."""

import numpy as np
import pytest
from test_rollout_play import played, settings
from toy_simulator import Line

from rlinf_core import UserError
from rlinf_core.contract.continuation import Continuation
from rlinf_core.rollout.delay import DelayedAgent, Latency
from rlinf_core.rollout.episodes import plan_episodes
from rlinf_core.rollout.messages import Act, Play
from rlinf_core.rollout.pool import Asking
from rlinf_core.rollout.worker import Jerk, _Episode

HORIZON = 8


class Counting:
    """Chunks [8, 2] of the number of the action that is due, plus 1000 for each chunk of the episode."""

    def __init__(self):
        self.seen = []

    def __call__(self, observations, generators, continuing):
        self.seen += zip([int(one["point"][1]) for one in observations], continuing, strict=True)
        return [self.chunk(int(one["point"][1])) for one in observations]

    def chunk(self, due):
        numbers = 1000.0 * len(self.seen) + due + np.arange(HORIZON)
        return np.stack([numbers, 0 * numbers], axis=1)


def executed(latency, replan):
    """The actions of one episode, which the toy simulator executes in this process."""
    actions = []

    class Recorded(Line):
        def step(self, action):
            actions.append(float(action[0]))
            return super().step(np.zeros(2))

    act = Counting()
    agent = DelayedAgent(act, latency, latency.executed(replan, HORIZON))
    config = settings(episodes=1, replan=replan, horizon=24, names=("right",))
    [episode] = plan_episodes(["policy"], config.chosen_tasks(), 1, 7)
    environment = Recorded(config.env, episode.task)
    environment.reset(episode.start)
    one = _Episode(Play(config.env, episode.task, episode.start, True), environment)
    while not one.over:
        asking = Asking(episode, one.look(), environment.actions, one.steps, np.random.default_rng(0))
        one.execute(Act(np.asarray(agent([asking])[0], np.float32)))
    return actions, act.seen


@pytest.mark.parametrize("chunks", ["switch", "guided", "trained"])
@pytest.mark.parametrize(("delay", "replan"), [(0, 2), (2, 3), (3, 2), (4, 4), (2, 0)])
def test_actions_are_those_of_their_tick_and_chunks_continue_what_is_left(chunks, delay, replan):
    actions, seen = executed(Latency(delay=delay, chunks=chunks), replan)
    assert [one % 1000 for one in actions] == list(range(24))
    looks = [tick for tick, _ in seen]
    step = max(replan or HORIZON - delay, delay)
    assert looks == list(range(0, 24, step))
    switches = [tick for tick in range(1, 24) if actions[tick] // 1000 != actions[tick - 1] // 1000]
    assert switches == [tick + delay for tick in looks[1:] if tick + delay < 24]
    assert seen[0][1] is None
    for tick, continuing in seen[1:]:
        if chunks == "switch":
            assert continuing is None
        else:
            assert isinstance(continuing, Continuation)
            assert (continuing.way, continuing.delay) == (chunks, delay)
            assert continuing.actions[0, 0] % 1000 == tick
            assert len(continuing.actions) == HORIZON - step


def test_a_robot_that_waits_idles_and_then_executes_from_the_first_action():
    actions, seen = executed(Latency(delay=3, chunks="wait"), 2)
    assert [tick for tick, _ in seen] == [0, 2, 7, 12, 17, 22]
    assert [one % 1000 for one in actions[:9]] == [0, 1, 0, 0, 0, 2, 3, 0, 0]


def test_episodes_with_a_delay_follow_from_their_seeds():
    latency = Latency(delay=2, chunks="switch")

    def act(observations, generators, continuing):
        return [np.tile(np.float32([generator.uniform(0.5, 1), 0]), (HORIZON, 1)) for generator in generators]

    runs = [
        [
            (one.number, one.task, one.steps, one.jerk)
            for one in played(settings(processes=processes), agents={"policy": DelayedAgent(act, latency, 3)})
        ]
        for processes in (1, 3)
    ]
    assert runs[0] == runs[1]
    assert all(jerk > 0 for *_, jerk in runs[0])


@pytest.mark.parametrize(
    ("delay", "replan", "message"),
    [
        (4, 5, "chunks of 9 actions, but the policy's have 8: choose --replan 4 or less"),
        (5, 0, "choose a delay of 4 or less"),
    ],
)
def test_a_delay_that_leaves_nothing_to_execute_is_refused(delay, replan, message):
    with pytest.raises(UserError, match=message):
        Latency(delay=delay, chunks="switch").executed(replan, HORIZON)
    assert Latency(delay=delay, chunks="wait").executed(replan, HORIZON) == (replan or HORIZON)


def test_jerk_is_the_mean_length_of_the_second_difference():
    actions = np.random.default_rng(0).standard_normal((9, 3)).astype(np.float32)
    jerk = Jerk()
    assert jerk.mean() is None
    for action in actions:
        jerk.add(action)
    second = np.diff(actions.astype(np.float64), n=2, axis=0)
    assert jerk.mean() == pytest.approx(np.linalg.norm(second, axis=1).mean(), rel=1e-12)
    steady = Jerk()
    for number in range(5):
        steady.add(np.float32([0.1 * number, 1.0]))
    assert steady.mean() == pytest.approx(0.0, abs=1e-6)
