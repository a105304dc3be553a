from toy_data import Rows

from rlinf_core.contract.datasets import LeRobotDatasetConfig
from rlinf_core.data.lerobot.source import open_lerobot
from rlinf_core.data.splits import describe_splits
from rlinf_core.testing import write_tiny_dataset


def test_splits_are_described_with_their_tasks(tmp_path):
    write_tiny_dataset(tmp_path / "tiny", cameras=[], vectors={"observation.state": 3, "action": 2})
    config = LeRobotDatasetConfig(repo_id=str(tmp_path / "tiny"), validation_episodes=(3,))
    train, held_out = (open_lerobot(config, 4, split) for split in ("train", "validation"))
    assert describe_splits(train, held_out) == "3 episodes of 2 tasks, 28 rows; held out: 1 episode of 1 task, 8 rows"
    assert describe_splits(Rows(25), None) == "3 episodes, 25 rows"
