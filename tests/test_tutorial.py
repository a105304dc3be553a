"""docs/tutorial_dataset.md from top to bottom, on data that the script of docs/convert_data.md makes."""

import importlib
import json
import re
import shlex
import sys
import tomllib

import numpy as np
import pytest
from distributions import ROOT, entry_point, repository_entry_points

from rlinf_core import cli, train
from rlinf_core.plugins.registry import DATASET_GROUP, Plugins, get_plugins

FPS = 15


def blocks(page):
    """The code blocks of a page in order: language and text."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return re.findall(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with recordings of three episodes, and with the dataset that the page's script makes of them."""
    place = tmp_path_factory.mktemp("tutorial")
    (place / "recordings").mkdir()
    generator = np.random.default_rng(0)
    for episode in range(3):
        length = 16 + episode
        state = generator.normal(size=(length, 7)).cumsum(axis=0)
        pictures = {name: generator.integers(0, 256, (length, 48, 64, 3), np.uint8) for name in ("front", "wrist")}
        task = "pick up the block" if episode else "put the block down"
        np.savez(place / "recordings" / f"{episode}.npz", state=state, action=state + 0.1, task=task, **pictures)
    [source] = [text for language, text in blocks("convert_data.md") if language == "python"]
    script = {}
    exec(compile(source, "convert_data.md", "exec"), script)
    script["PICTURE"]["shape"] = (48, 64, 3)  # Quicker than 480 x 640.
    script["convert"](place / "recordings", place / "data" / "franka_pick", FPS)
    return place


@pytest.fixture
def run(monkeypatch):
    """Run a command of the page, in this process: torchrun, pip and pytest would take another."""

    def run(words):
        match words:
            case ["rlinf", "launch", config]:
                return train.main([config, "runner.max_steps=2"])
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


def test_the_script_writes_what_it_was_given(place, capsys):
    assert cli.main(["check-dataset", str(place / "data" / "franka_pick"), "--full", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["ok"], report["episodes"], report["frames"]) == (True, 3, 16 + 17 + 18)


def test_the_tutorial_runs_from_top_to_bottom(place, run, monkeypatch, capsys):
    monkeypatch.chdir(place)
    configs, python = [], {}
    for language, text in blocks("tutorial_dataset.md"):
        if language == "toml" and not configs:
            (place / "franka.toml").write_text(text, encoding="utf-8")
        if language == "toml":
            configs.append(tomllib.loads(text))
        elif language == "python":
            exec(compile(text, "tutorial_dataset.md", "exec"), python)
        for line in text.splitlines() if language == "bash" else ():
            words = shlex.split(line, comments=True)
            assert run(words) == 0, (line, capsys.readouterr().err)
    assert python["actions"].shape == (configs[0]["policy"]["action_horizon"], configs[0]["data"]["action_width"])
    said = capsys.readouterr().out
    assert "franka-pick: a package with the dataset format pi05_franka_pick" in said
    assert re.search(r"^pi05_franka_pick\b.*\bfranka-pick\b", said, re.MULTILINE)
    assert "FrankaPick conforms" in said
    assert (place / "exported" / "franka_pick" / "norm_stats.json").exists()
    written = importlib.import_module("franka_pick").FrankaPick()
    by_hand = configs[0]["data"]
    assert (written.raw_action_is_delta, list(written.gripper)) == (by_hand["raw_action_is_delta"], by_hand["gripper"])
    assert (written.images, written.action_width) == (by_hand["images"], by_hand["action_width"])
