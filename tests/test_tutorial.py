"""docs/tutorial_dataset.md from top to bottom, on less of its data; and the script of docs/convert_data.md."""

import importlib
import json
import re
import runpy
import shlex
import sys
import tomllib
from types import ModuleType

import numpy as np
import pytest
from distributions import ROOT, entry_point, repository_entry_points

from rlinf_core import cli, train
from rlinf_core.plugins.registry import DATASET_GROUP, Plugins, get_plugins
from rlinf_core.testing import check_dataset
from rlinf_plugins_openpi import Pi05Config

FPS = 15


def blocks(page):
    """The code blocks of a page in order: language and text."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return re.findall(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the tutorial's datasets, of shorter and fewer episodes."""
    place = tmp_path_factory.mktemp("tutorial")
    write = runpy.run_path(str(ROOT / "examples" / "write_tutorial_data.py"))["write"]
    write(place / "data" / "franka_pick", [None], ["front", "wrist"], episodes=3, frames=18)
    write(place / "data" / "two_arms", ["left", "right"], ["high", "left_wrist", "right_wrist"], episodes=1, frames=18)
    return place


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """The dataset that the script of convert_data.md makes of recordings of two episodes."""
    place = tmp_path_factory.mktemp("converted")
    (place / "recordings").mkdir()
    generator = np.random.default_rng(0)
    for episode in range(2):
        length = 4 + episode
        state = generator.normal(size=(length, 7)).cumsum(axis=0)
        pictures = {name: generator.integers(0, 256, (length, 48, 64, 3), np.uint8) for name in ("front", "wrist")}
        task = "pick up the block" if episode else "put the block down"
        np.savez(place / "recordings" / f"{episode}.npz", state=state, action=state + 0.1, task=task, **pictures)
    [source] = [text for language, text in blocks("convert_data.md") if language == "python"]
    script = {}
    exec(compile(source, "convert_data.md", "exec"), script)
    script["PICTURE"]["shape"] = (48, 64, 3)  # Quicker than 480 x 640.
    script["convert"](place / "recordings", place / "franka_pick", FPS)
    return place / "franka_pick"


@pytest.fixture
def run(monkeypatch):
    """Run a command of the page, in this process: torchrun, pip and pytest would take another."""

    def run(words):
        match words:
            case ["python", "examples/write_tutorial_data.py", "data"]:
                return 0  # `place` has run it.
            case ["rlinf", "launch", config]:
                return train.main([config, "runner.max_steps=2"])
            case ["rlinf", "inspect" | "plan", config]:  # tests/inspect and tests/plan run them.
                return cli.main(["validate", config])
            case ["rlinf", *arguments]:
                return cli.main(arguments)
            case ["pip", "install", "-e", folder]:
                install(folder)
            case ["pytest", folder]:
                tests = importlib.import_module(f"test_{folder.replace('-', '_')}")
                tests.test_the_format_conforms_and_the_data_fit()
            case _:
                pytest.fail(f"the page has a command that nothing here runs: {words}")
        return 0

    def install(folder):
        with open(f"{folder}/pyproject.toml", "rb") as file:
            project = tomllib.load(file)["project"]
        monkeypatch.syspath_prepend(folder)
        offered = project["entry-points"][DATASET_GROUP].items()
        entries = [entry_point(DATASET_GROUP, name, value, project["name"]) for name, value in offered]
        plugins = Plugins([*repository_entry_points(), *entries], strict=True)
        monkeypatch.setattr(Plugins, "load", classmethod(lambda cls: plugins))
        get_plugins.cache_clear()

    yield run
    get_plugins.cache_clear()
    for name in ("franka_pick", "test_franka_pick"):
        sys.modules.pop(name, None)


def test_the_script_writes_what_it_was_given(converted, capsys):
    assert cli.main(["check-dataset", str(converted), "--full", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["ok"], report["episodes"], report["frames"]) == (True, 2, 4 + 5)


def test_the_tutorial_runs_from_top_to_bottom(place, run, monkeypatch, capsys):
    monkeypatch.chdir(place)
    configs, python = [], {}
    for language, text in blocks("tutorial_dataset.md"):
        if language == "toml":
            configs.append(tomllib.loads(text))
            (place / ("franka.toml", "two_arms.toml", "full.toml")[len(configs) - 1]).write_text(text, encoding="utf-8")
        elif language == "python":
            exec(compile(text, "tutorial_dataset.md", "exec"), python)
        for line in text.splitlines() if language == "bash" else ():
            words = shlex.split(line, comments=True)
            assert run(words) == 0, (line, capsys.readouterr().err)
    assert python["actions"].shape == (configs[0]["policy"]["action_horizon"], configs[0]["data"]["action_width"])
    said = capsys.readouterr().out
    assert re.search(r"^joint_1 .*policy \d\.\d{3} .*standing still 0\.\d{3}$", said, re.MULTILINE)
    assert (place / "recorded_against_predicted.png").exists()
    assert re.search(r"^actions\[13: right_gripper\] +\S+ +\S+ +-1e-10 +0\.99", said, re.MULTILINE)
    assert 0 < np.abs(python["rounded"] - python["policy"].infer(python["observation"], python["noise"])).max() < 0.1
    assert "franka-pick: a package with the dataset format pi05_franka_pick" in said
    assert re.search(r"^pi05_franka_pick\b.*\bfranka-pick\b", said, re.MULTILINE)
    assert "FrankaPick conforms" in said
    assert (place / "exported" / "franka_pick" / "norm_stats.json").exists()
    written = importlib.import_module("franka_pick").FrankaPick()
    by_hand = configs[0]["data"]
    assert (written.raw_action_is_delta, list(written.gripper)) == (by_hand["raw_action_is_delta"], by_hand["gripper"])
    assert (written.images, written.action_width) == (by_hand["images"], by_hand["action_width"])


def test_the_transform_of_the_page_is_undone_in_the_robots_units(place, monkeypatch):
    monkeypatch.chdir(place)
    [source] = [text for language, text in blocks("tutorial_dataset.md") if "PercentGrippers" in text]
    page = ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", page)  # Transforms are pickled by their module's name.
    exec(compile(source, "tutorial_dataset.md", "exec"), vars(page))
    data = page.TwoArms(repo_id="data/two_arms")
    assert check_dataset(data, rows=4, policy=Pi05Config(variant="dummy", action_horizon=15)).not_checked == ()
    first, *_, last = data.transforms()
    sample = {"state": np.full(14, 100.0), "actions": np.full((15, 14), 50.0)}
    given = last(first(sample))
    assert given["actions"][0, [0, 6, 13]].tolist() == [-50.0, 0.5, 0.5]
