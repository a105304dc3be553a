"""`rlinf triage` from the command line to the page, on a run of a few steps; and the mistakes that can be planted."""

import argparse
import asyncio
import json
import re
import threading

import numpy as np
import pytest
import small_arm
import torch
from distributions import entry_point, repository_entry_points

from rlinf_core import TriageOutcome, TriageTest, UserError, hookimpl
from rlinf_core.commands import triage as command
from rlinf_core.config.load import load_config
from rlinf_core.export import Choice
from rlinf_core.inference import LoadedPolicy, load_run
from rlinf_core.plugins.registry import DATASET_GROUP, PLUGIN_GROUP, Plugins
from rlinf_core.serving.server import PolicyServer
from rlinf_core.testing import triage as planting
from rlinf_core.testing.plants import PLANTS, Settings
from rlinf_core.testing.triage import plant
from rlinf_core.testing.triage_corpus import main as corpus
from rlinf_core.training.distributed.processes import processes
from rlinf_core.training.run_folder import prepare_folder
from rlinf_core.triage.chain import registered_tests, run_tests
from rlinf_core.triage.opening import open_scene
from rlinf_core.triage.page import page_of
from rlinf_core.triage.tests.server import ServerTest

CONFIG = """\
[runner]
name = "arm"
output_dir = "{folder}/runs"
max_steps = 3
val_check_interval = 3
val_samples = 8
[data]
config_name = "small_arm"
repo_id = "{folder}/arm"
validation_fraction = 0.25
num_workers = 0
[policy]
width = 16
[optim]
warmup_steps = 1
decay_steps = 3
ema_decay = 0.5
[trainer]
device = "cpu"
global_batch_size = 8
micro_batch_size = 8
param_dtype = "fp32"
"""
HOSTILE = "<script>alert(1)</script> \x1b[2J"


def with_small_arm(*more):
    own = [entry_point(PLUGIN_GROUP, "arm", small_arm), entry_point(DATASET_GROUP, "small_arm", small_arm.SmallArm)]
    return Plugins([*repository_entry_points(), *own, *more])


@pytest.fixture(scope="module")
def plugins():
    return with_small_arm()


@pytest.fixture(scope="module")
def run(tmp_path_factory, plugins):
    """The folder of a run of three steps."""
    folder = tmp_path_factory.mktemp("triage")
    small_arm.write(folder / "arm", episodes=8, seed=0)
    (folder / "config.toml").write_text(CONFIG.format(folder=folder))
    config = load_config(folder / "config.toml", [], plugins)
    with processes("cpu") as group:
        start = prepare_folder(config, overwrite=False)
        config.trainer.build(config, start=start, group=group, plugins=plugins).train()
    return folder / "runs/arm"


@pytest.fixture
def triage(monkeypatch, plugins, capsys):
    """Run the command; returns what it printed."""
    monkeypatch.setattr("rlinf_core.plugins.registry.get_plugins", lambda: plugins)

    def call(*arguments):
        parser = argparse.ArgumentParser()
        command.add_arguments(parser)
        command.run(parser.parse_args([str(one) for one in arguments]))
        return capsys.readouterr().out

    return call


def test_a_run_that_has_not_learned_is_named_and_the_page_holds_everything(run, triage, tmp_path):
    page = tmp_path / "page.html"
    printed = triage(run, "--output", page)
    assert re.search(r"^learned +cause +the policy is no better than always the mean action", printed, re.MULTILINE)
    assert re.search(r"^cameras +skipped", printed, re.MULTILINE)
    assert printed.strip().splitlines()[-1].startswith("Cause: the policy is no better than")
    html = page.read_text()
    assert "Has the policy learned its own data?" in html
    assert "<script" not in html
    triage(run, "--output", page)  # An earlier page is replaced,
    page.write_text("mine")
    with pytest.raises(UserError, match="is not an earlier page of rlinf triage"):  # and nothing else.
        triage(run, "--output", page)


@pytest.mark.slow
def test_the_site_is_compared_and_json_has_every_test(run, triage, plugins, tmp_path, monkeypatch):
    for name, few in (("RUNS", 8), ("REFERENCE", 80), ("WIDE", 300), ("ACTED", 16)):
        monkeypatch.setattr(f"rlinf_core.triage.scene.{name}", few)
    planted = plant("rotated", run, tmp_path / "site", plugins=plugins, dataset=str(run.parents[1] / "arm"))
    result = json.loads(triage(run, "--dataset", planted.dataset, "--json"))
    by_name = {one["name"]: one for one in result["tests"]}
    assert by_name["cameras"]["verdict"] == "cause"
    assert "all cameras are rotated by 180°" in by_name["cameras"]["sentence"]
    assert result["cause"] == "cameras"  # Not having learned may follow from it, and is named last.
    assert by_name["learned"]["symptom"]
    assert {one.name for one in (test for test, _ in registered_tests(plugins))} == by_name.keys()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "there is no nowhere"),
        (["RUN", "--minutes", "3"], "--minutes is for episodes that the policy plays: add --episodes N"),
        (["RUN", "--server", "ws://127.0.0.1:1"], "there is no policy server at ws://127.0.0.1:1"),
        (["RUN", "--episodes", "3"], "--episodes is for a simulator: add --env NAME"),
        (["RUN", "--dataset", "nowhere/at-all"], "nowhere/at-all"),
        (["RUN", "--execute-steps", "9"], "a chunk has 8 actions: 9 of them cannot be executed"),
    ],
)
def test_mistakes_of_users_are_one_message(arguments, message, run, triage, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("rlinf_core.triage.served.WAIT", 0.2)
    arguments = [run if one == "RUN" else one for one in arguments]
    if arguments[1:2] == ["--execute-steps"]:  # Other tests still answer.
        assert message in triage(*arguments, "--json")
    else:
        with pytest.raises(UserError, match=re.escape(message)):
            triage(*arguments, "--json")


@pytest.mark.parametrize("name", ["wrong-statistics", "min-max", "half-loaded"])
def test_a_changed_folder_is_recognised(name, run, plugins, tmp_path):
    planted = plant(name, run, tmp_path / "folder", plugins=plugins)
    scene = open_scene(planted.policy, plugins=plugins, run=run)
    assert scene.subject.description["validation"]["metrics"].keys() >= {"val_action_mse", "ema_val_action_mse"}
    tests = {test.name: test for test, _ in registered_tests(plugins)}
    found = tests[planted.plant.test]().run(scene)
    assert found.verdict == "cause"
    words = {"min-max": "minimum and maximum", "half-loaded": "are not those of the run's checkpoint"}
    assert words.get(name, "are not those of the training data") in found.sentence


def test_a_folder_without_its_run_shows_what_was_changed_after_the_export(run, plugins, tmp_path, monkeypatch):
    monkeypatch.setattr(planting, "_sign", lambda folder: None)
    planted = plant("half-loaded", run, tmp_path / "folder", plugins=plugins)
    scene = open_scene(planted.policy, plugins=plugins)
    tests = {test.name: test for test, _ in registered_tests(plugins)}
    found = tests["weights"]().run(scene)
    assert found.verdict == "cause"
    assert "model.safetensors is not the file that rlinf export wrote" in found.sentence


def test_weights_that_were_trained_in_bf16_are_recognised(run, plugins):
    scene = open_scene(run, plugins=plugins)
    tests = {test.name: test for test, _ in registered_tests(plugins)}
    assert "bfloat16" not in tests["weights"]().run(scene).sentence
    with torch.no_grad():
        for parameter in scene.policy.module.parameters():
            parameter.copy_(parameter.bfloat16())
    found = tests["weights"]().run(scene)
    assert found.verdict == "cause"
    assert "100% of the trained weights are numbers of bfloat16" in found.sentence


class Hostile(TriageTest):
    name = "hostile"
    question = HOSTILE

    def run(self, scene):
        return TriageOutcome("suspicious", HOSTILE, images={HOSTILE: np.zeros((4, 4, 3), np.uint8)})


class Broken(TriageTest):
    name = "broken"
    question = "Does it break?"

    def run(self, scene):
        raise ZeroDivisionError("of this test")


class MyTests:
    @staticmethod
    @hookimpl
    def rlinf_register_triage():
        return [Hostile, object]


def test_tests_of_plugins_run_last_and_what_they_say_is_escaped(run):
    plugins = with_small_arm(entry_point(PLUGIN_GROUP, "mine", MyTests, "mine"))
    scene = open_scene(run, plugins=plugins)
    found = run_tests(scene, plugins)
    assert found.findings[-1].outcome.sentence == HOSTILE
    assert "expected a subclass of TriageTest" in str(plugins.failures[0])
    html = page_of(run, "", found)
    assert "<script>alert" not in html
    assert "\x1b" not in html
    assert "&lt;script&gt;" in html


def test_a_defect_of_a_plugins_test_names_it(run, plugins, monkeypatch):
    monkeypatch.setattr(
        "rlinf_core.triage.chain.registered_tests", lambda plugins: [(Broken, registered_tests(plugins)[0][1])]
    )
    with pytest.raises(ZeroDivisionError) as caught:
        run_tests(open_scene(run, plugins=plugins), plugins)
    assert "in the triage test 'broken' of" in caught.value.__notes__[0]


class Served:
    """A server in this process, which does something to what it gets or answers."""

    takes_noise = True

    def __init__(self, policy, seen=lambda row: row, answered=lambda actions: actions, hashes=()):
        self.policy, self.seen, self.answered = policy, seen, answered
        self.hashes = list(hashes)

    def act(self, row, noise):
        return self.answered(self.policy.infer(self.seen(dict(row)), noise))

    def other_files(self, description):
        return self.hashes


def _with(row, column, change):
    return {**row, column: np.ascontiguousarray(change(row[column]))}


def _negate_gripper(actions):
    return actions * np.r_[np.ones(6), -1]


WRONG_SERVERS = {
    "negating action [6: gripper]": {"answered": _negate_gripper},
    "leaving out the first 1 of its actions": {"answered": lambda actions: actions[1:]},
    "rotating camera 'front' by 180°": {
        "seen": lambda row: _with(row, "observation.images.front", lambda x: x[::-1, ::-1])
    },
    "setting the state to 0": {"seen": lambda row: _with(row, "observation.state", np.zeros_like)},
    "it has loaded other files (model.safetensors)": {
        "answered": lambda actions: actions + np.random.default_rng(0).normal(0, 1, actions.shape),
        "hashes": ["model.safetensors"],
    },
}


@pytest.mark.parametrize(
    "words", [one if one.startswith("negating") else pytest.param(one, marks=pytest.mark.slow) for one in WRONG_SERVERS]
)
def test_what_a_server_does_otherwise_is_named(words, run, plugins):
    scene = open_scene(run, plugins=plugins)
    if words.startswith(("rotating", "setting")):  # Three steps of training hardly use the observation.
        with torch.no_grad():
            for parameter in scene.policy.module.parameters():
                parameter.mul_(3)
    bare = LoadedPolicy(scene.policy.config, scene.policy.data, scene.pipeline, scene.policy.module)
    scene.server = Served(bare, **WRONG_SERVERS[words])
    found = ServerTest().run(scene)
    assert found.verdict == "cause"
    assert words in found.sentence


def test_a_server_that_acts_as_the_policy_does_is_fine(run, plugins):
    """Over a socket, with the server of `rlinf serve`."""
    ready = threading.Event()
    policy, _, _ = load_run(run, Choice(), device="cpu", dtype="fp32", plugins=plugins)
    server = PolicyServer(policy, {"server": "rlinf-core 1"})
    found = {}

    async def serve():
        found["loop"] = asyncio.get_running_loop()
        await server.run("127.0.0.1", 0, lambda port: (found.update(port=port), ready.set()))

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        assert ready.wait(30)
        scene = open_scene(run, plugins=plugins, server=f"ws://127.0.0.1:{found['port']}")
        with scene.server:
            outcome = ServerTest().run(scene)
        assert outcome.verdict == "fine", outcome.sentence
    finally:
        found["loop"].call_soon_threadsafe(server.stop.set)
        thread.join(30)


QUICK = ("swapped-cameras", "quaternion-sign", "absolute", "late", "rate")
"""Mistakes that are planted in the quick suite; the corpus plants all."""


@pytest.mark.parametrize("one", [one for one in PLANTS if one.name in QUICK], ids=lambda one: one.name)
def test_a_mistake_of_the_site_can_be_planted_and_read(one, run, plugins, tmp_path):
    planted = plant(one.name, run, tmp_path / "site", plugins=plugins, episodes=3)
    plain = plant("none", run, tmp_path / "plain", plugins=plugins, episodes=3)
    rows = [open_scene(run, plugins=plugins, dataset=str(p.dataset)).site for p in (planted, plain)]
    assert (len(rows[0]) == len(rows[1])) == (one.name != "rate")
    last = int(np.flatnonzero(rows[1].episodes == rows[1].episodes[0])[-1])
    first, other = (source.__getitems__([min(last, len(source) - 1)])[0] for source in rows)
    assert [key for key in first if not np.array_equal(first[key], other[key])]
    assert f"--dataset {planted.dataset}" in planted.command


@pytest.mark.slow
def test_the_table_of_mistakes_is_printed(run, plugins, monkeypatch, capsys):
    monkeypatch.setattr("rlinf_core.testing.triage_corpus.get_plugins", lambda: plugins)
    assert corpus([str(run), "--plant", "half-loaded", "empty-prompt", "--episodes", "3"]) == 0
    printed = capsys.readouterr().out
    assert re.search(
        r"^\| half-loaded \| half of the tensors are random \| yes \(`weights`\) \|", printed, re.MULTILINE
    )
    assert re.search(r"^\| empty-prompt \| the prompt is empty \| yes \(`prompts`\) \|", printed, re.MULTILINE)
    assert printed.endswith("2 of 2 named first\n")
    assert corpus([str(run), "--plant", "half-loadd"]) == 2


def test_planting_has_settings_and_refuses_what_is_not_there(run, plugins, tmp_path):
    settings = Settings(cameras=("observation.images.wrist",))
    planted = plant("bgr", run, tmp_path / "wrist", plugins=plugins, settings=settings, episodes=2)
    plain = plant("none", run, tmp_path / "plain", plugins=plugins, episodes=2)
    a, b = (
        open_scene(run, plugins=plugins, dataset=str(p.dataset)).site.__getitems__([0])[0] for p in (planted, plain)
    )
    assert np.array_equal(a["observation.images.front"], b["observation.images.front"])
    assert np.array_equal(a["observation.images.wrist"], b["observation.images.wrist"][..., ::-1])
    with pytest.raises(UserError, match="there is no mistake 'bqr'; did you mean 'bgr'"):
        plant("bqr", run, tmp_path / "x", plugins=plugins)
    with pytest.raises(UserError, match="already exists"):
        plant("bgr", run, tmp_path / "wrist", plugins=plugins)
