"""What a server says of its policy, and what rlinf-client compares with a robot."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from saved_run import save_run

from rlinf_client.contract import compare
from rlinf_core import cli
from rlinf_core.config.load import load_config
from rlinf_core.data.coverage import LONGEST_TASK, MOST_TASKS, list_tasks
from rlinf_core.inference import load_policy
from rlinf_core.plugins.registry import get_plugins
from rlinf_core.serving.description import describe_policy
from rlinf_core.training.data import RunData
from rlinf_core.training.distributed.processes import processes


@pytest.fixture(scope="module")
def described(tmp_path_factory):
    """The metadata of the quickstart's policy, exported after a run began on its dataset."""
    there = tmp_path_factory.mktemp("described")
    run = load_config("examples/quickstart.toml", [f"runner.output_dir={there}", "data.num_workers=0"])
    values = {name: torch.zeros_like(one) for name, one in run.policy.build().named_parameters()}
    with processes("cpu") as group:
        opened = RunData.open(run, get_plugins())
        run.folder.mkdir()
        data = opened.prepare(group, resuming=False)
        data.save_coverage()
        for file in run.folder.iterdir():
            shutil.copy(file, there)
        shutil.rmtree(run.folder)
        save_run(run, values, data.sources[0].pipeline.normalize.stats, group)
        shutil.copy(there / "coverage.json", run.folder)
    assert cli.main(["export", str(run.folder), "--output", str(there / "policy")]) == 0
    policy = load_policy(there / "policy", steps=3)
    return describe_policy(policy, there / "policy")


def test_the_contract_is_what_the_dataset_says(described):
    info = json.loads(Path("examples/data/metaworld_3tasks/meta/info.json").read_text())
    assert described["fps"] == info["fps"]
    (camera,) = described["cameras"]
    assert camera["column"] == "observation.image"
    assert camera["sizes"] == [info["features"]["observation.image"]["shape"][:2]]
    assert described["action_names"] == ["dx", "dy", "dz", "gripper_effort"]
    assert len(described["state_names"]) == info["features"]["observation.state"]["shape"][0]
    assert described["num_tasks"] == 3 == len(described["tasks"])
    assert described["action_horizon"] == 5
    assert (described["num_steps"], described["dtype"]) == (3, "fp32")
    assert described["accepts"] == ["noise", "seed", "num_steps"]
    assert described["sha256"].keys() >= {"model.safetensors", "norm_stats.json"}


def observation(described, **changes):
    height, width = described["cameras"][0]["sizes"][0]
    return {
        "observation/image": np.zeros((height, width, 3), np.uint8),
        "observation/state": np.zeros(len(described["state_names"])),
        "prompt": described["tasks"][0],
    } | changes


def test_an_observation_like_training_has_no_remark(described):
    assert compare(described, observation(described), described["fps"]) == []
    columns = {described["observation_names"].get(k, k): v for k, v in observation(described).items()}
    assert compare(described, columns) == []
    nested = observation(described)
    nested["observation"] = {"image": nested.pop("observation/image"), "state": nested.pop("observation/state")}
    assert compare(described, nested) == []


REMARKS = [
    ({"prompt": "fold the towel"}, None, "the task 'fold the towel' is not among the 3"),
    ({"observation/image": np.zeros((512, 512, 3), np.uint8)}, None, "details are finer or coarser"),
    ({"observation/image": np.zeros((480, 640, 3), np.uint8)}, None, "another aspect ratio"),
    ({"observation/image": np.zeros((3, 480, 640), np.uint8)}, None, "640 x 480 pixels"),
    ({}, 50.0, "50 actions per second, the training data have"),
]


@pytest.mark.parametrize(("change", "rate", "remark"), REMARKS)
def test_what_differs_from_training_is_a_remark(described, change, rate, remark):
    (found,) = compare(described, observation(described, **change), rate)
    assert remark in found


def test_what_the_server_would_refuse_is_one_error_with_all_of_it(described):
    seen = observation(described) | {"observation/state": np.zeros(39), "observation/image": np.zeros((64, 64))}
    with pytest.raises(ValueError, match=r"the state has 39 numbers, in training 4: .*'observation/image' is float64"):
        compare(described, seen)
    with pytest.raises(ValueError, match=r"lacks 'observation.image' or 'observation/image'"):
        compare(described, {"observation/imag": seen["observation/image"]})


ODD = [{}, {"cameras": 3, "observation_columns": "x"}, {"cameras": [{"column": "a"}, 5], "observation_names": []}]


@pytest.mark.parametrize("metadata", [*ODD, {"tasks": [1], "num_tasks": 1, "fps": "fast", "state_columns": ["s"]}])
def test_servers_that_say_less_or_something_else_are_compared_with_nothing(metadata):
    assert compare(metadata, {"observation/state": np.zeros(3), "s": [1]}, 10.0) == []


def test_listed_tasks_are_bounded():
    found = list_tasks(["pick"] * 5 + ["x" * 1000] + [f"task {number}" for number in range(100)])
    assert found["num_tasks"] == 102
    assert len(found["tasks"]) == MOST_TASKS
    assert found["tasks"][:2] == ("pick", "x" * LONGEST_TASK)
