import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from rlinf_core.contract.datasets import DatasetConfig, LeRobotDatasetConfig
from rlinf_core.data.lerobot.episodes import EpisodeTable, held_out_episodes, split_episodes
from rlinf_core.data.lerobot.source import open_lerobot
from rlinf_core.errors import UserError
from rlinf_core.testing import write_tiny_dataset


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


TEXTS = {0: "reach", 1: "push the puck", 7: "press"}
NUMBERS = np.array([0, 1, 2, 3, 4, 9])
QUALITY = np.array([0.0, 1.0, 0.5, 1.0, 1.0, 0.2])


def split(quality=None, **fields):
    config = LeRobotDatasetConfig(repo_id="me/data", **fields)
    table = EpisodeTable(NUMBERS, np.array([5, 6, 7, 8, 9, 50]), np.array([0, 0, 1, 1, 7, 7]), TEXTS, quality)
    training, held_out = split_episodes(config, table)
    return sorted(training), sorted(held_out)


@pytest.mark.parametrize(
    ("fields", "training", "held_out"),
    [
        ({}, [0, 1, 2, 3, 4, 9], []),
        ({"episodes": ("1-3", 9)}, [1, 2, 3, 9], []),
        ({"episodes": ("0-9",), "exclude_episodes": (0, "3-4")}, [1, 2, 9], []),
        ({"tasks": ("push the puck", 7)}, [2, 3, 4, 9], []),
        ({"min_episode_length": 6, "max_episode_length": 9}, [1, 2, 3, 4], []),
        ({"quality_column": "success", "quality": QUALITY}, [1, 3, 4], []),
        ({"quality_column": "success", "quality": QUALITY, "min_quality": 0.5}, [1, 2, 3, 4], []),
        ({"validation_tasks": ("press",)}, [0, 1, 2, 3], [4, 9]),
        ({"validation_tasks": (1,), "exclude_episodes": (2,)}, [0, 1, 4, 9], [3]),
        ({"validation_episodes": (3,), "tasks": (1,)}, [2], [3]),
    ],
)
def test_episodes_are_chosen_by_number_task_length_and_quality(fields, training, held_out):
    assert split(**fields) == (training, held_out)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"episodes": (5,)}, r"data\.episodes names 5, but the episodes of me/data are 0 to 9, with gaps"),
        ({"episodes": ("0-99",)}, r"data\.episodes names 0-99, but"),
        ({"exclude_episodes": ("3-1",)}, r"data\.exclude_episodes names 3-1, but"),
        (
            {"tasks": ("push the pucks",)},
            r"names 'push the pucks', .*did you mean 'push the puck'\?; it has 3: 0 'reach'",
        ),
        ({"validation_tasks": (2,)}, r"data\.validation_tasks names 2, which is not a task of me/data; it has 3"),
        ({"validation_tasks": (0,), "tasks": (1,)}, r"data\.validation_tasks holds out no episode"),
        ({"validation_tasks": (1,), "tasks": (1,)}, r"data\.validation_tasks holds out every episode"),
        (
            {"validation_episodes": (3,), "episodes": (1,)},
            r"data\.validation_episodes names \[3\], .* selected episodes of me/data",
        ),
        (
            {"tasks": (0,), "min_episode_length": 7},
            r"none of its 6 episodes \(5 to 50 frames\) passes data\.tasks, data\.min_ep",
        ),
    ],
)
def test_a_choice_that_cannot_be_made_names_what_there_is(fields, text):
    with pytest.raises(UserError, match=text):
        split(**fields)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"episodes": ("7-",)}, "should match pattern"),
        ({"validation_tasks": (1,), "validation_fraction": 0.1}, "set one of validation_tasks"),
        ({"min_quality": 0.5}, "min_quality needs quality_column"),
        ({"min_episode_length": 5, "max_episode_length": 4}, "is less than min_episode_length"),
    ],
)
def test_a_choice_that_contradicts_itself_is_refused(fields, text):
    with pytest.raises(ValidationError, match=text):
        LeRobotDatasetConfig(**fields)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("subsets") / "tiny"
    write_tiny_dataset(root, cameras=[], vectors={"observation.state": 3, "action": 2, "success": 1})
    path = next((root / "meta" / "episodes").glob("*/*.parquet"))
    table = pq.read_table(path)
    pq.write_table(table.append_column("good", pa.array([True, False, True, False])), path)
    return root


def opened(root, split="train", **fields):
    return open_lerobot(LeRobotDatasetConfig(repo_id=str(root), **fields), 4, split)


def test_a_datasets_own_columns_say_which_episodes_are_good(root):
    assert set(opened(root, quality_column="good").episodes) == {0, 2}
    frames = pq.read_table(next((root / "data").glob("*/*.parquet")))
    success = np.array(frames["success"].to_pylist()).reshape(-1)
    means = [success[frames["episode_index"].to_numpy() == episode].mean() for episode in range(4)]
    best = int(np.argmax(means))
    assert set(opened(root, quality_column="success", min_quality=float(means[best]) - 1e-6).episodes) == {best}
    with pytest.raises(UserError, match=r"names 'goood', .* its episodes have good, .* its frames have"):
        opened(root, quality_column="goood")
    with pytest.raises(UserError, match=r"names 'tasks', whose values are not single numbers"):
        opened(root, quality_column="tasks")
    with pytest.raises(UserError, match=r"names 'action', whose values are not single numbers"):
        opened(root, quality_column="action")


def test_another_choice_is_another_fingerprint(root):
    choices: list[dict] = [{}, {"exclude_episodes": (1,)}, {"tasks": (0,)}, {"episodes": (0,)}]
    assert len({opened(root, **choice).fingerprint() for choice in choices}) == 4


def test_numbers_that_are_none_do_not_matter_in_episodes_that_are_left_out(root, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(root, damaged)
    path = next((damaged / "data").glob("*/*.parquet"))
    table = pq.read_table(path)
    rows = table["action"].to_pylist()
    rows[12] = [float("nan"), 0.0]  # Episode 1.
    column = table.column_names.index("action")
    pq.write_table(table.set_column(column, "action", pa.array(rows, table["action"].type)), path)
    with pytest.raises(
        UserError, match=r"NaN or infinity in 1 frames of 1 episodes \(1\)[\s\S]*data\.exclude_episodes"
    ):
        opened(damaged)
    assert set(opened(damaged, exclude_episodes=(1,)).episodes) == {0, 2, 3}
