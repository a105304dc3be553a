import pytest

from rlinf_core.data.splits import held_out_episodes
from rlinf_core.datasets import DatasetConfig
from rlinf_core.errors import UserError


def held_out(fraction, tasks):
    return held_out_episodes(DatasetConfig(validation_fraction=fraction), tasks)


@pytest.mark.parametrize(
    ("fraction", "tasks", "episodes"), [(0.05, 50, 5), (0.1, 3, 36), (0.001, 2, 4), (0.9, 4, 3), (0.2, 7, 1)]
)
def test_a_share_is_taken_evenly_over_tasks(fraction, tasks, episodes):
    task_of = {task * episodes + i: task for task in range(tasks) for i in range(episodes)}
    if episodes == 1:
        with pytest.raises(UserError, match="only one episode"):
            held_out(fraction, task_of)
        return
    chosen = held_out(fraction, task_of)
    counts = [sum(task_of[episode] == task for episode in chosen) for task in range(tasks)]
    assert max(counts) - min(counts) <= 1
    assert max(counts) < episodes
    assert len(chosen) == min(max(1, round(fraction * len(task_of))), tasks * (episodes - 1))


def test_uneven_tasks_keep_an_episode_each():
    task_of = {0: 0, 1: 1, 2: 1} | dict.fromkeys(range(3, 30), 2)
    chosen = held_out(0.5, task_of)
    assert 0 not in chosen
    assert len(chosen & {1, 2}) == 1
    assert len(chosen) in (14, 15)


def test_the_choice_does_not_follow_the_order_of_recording():
    chosen = held_out(0.25, dict.fromkeys(range(100), 0))
    assert max(chosen) > 75
    assert len(chosen) == 25
