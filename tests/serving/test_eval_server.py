"""`rlinf eval --server`: over the real protocol, what the same policy does in this process."""

import asyncio
import json
import threading

import msgpack
import numpy as np
import pytest
import torch
import toy_simulator
from distributions import entry_point, repository_entry_points
from saved_run import save_run
from websockets.sync.server import serve as serve_sync

from rlinf_client.wire import pack, unpack
from rlinf_core import cli
from rlinf_core.config.load import load_config
from rlinf_core.data.normalize import NormStats
from rlinf_core.inference import load_policy
from rlinf_core.plugins import registry
from rlinf_core.plugins.registry import PLUGIN_GROUP, Plugins
from rlinf_core.serving.description import describe_policy
from rlinf_core.serving.server import PolicyServer
from rlinf_core.training.distributed.processes import processes


@pytest.fixture(scope="module", autouse=True)
def plugins():
    found = Plugins([*repository_entry_points(), entry_point(PLUGIN_GROUP, "line", toy_simulator, "line")])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "get_plugins", lambda: found)
        yield found


@pytest.fixture(scope="module")
def folder(tmp_path_factory, plugins):
    """The exported dummy π0.5 with random weights."""
    there = tmp_path_factory.mktemp("evaluated")
    changes = ["policy.num_sampling_steps=2", f"runner.output_dir={there}", "data.num_workers=0"]
    run = load_config("examples/quickstart.toml", changes, plugins)
    torch.manual_seed(0)
    values = {name: torch.randn_like(one) * 0.05 for name, one in run.policy.build().named_parameters()}
    spread = NormStats(mean=np.zeros(4), std=np.ones(4), q01=-np.ones(4), q99=np.ones(4))
    with processes("cpu") as group:
        save_run(run, values, {"state": spread, "actions": spread}, group)
    assert cli.main(["export", str(run.folder), "--output", str(there / "policy")]) == 0
    return there / "policy"


@pytest.fixture(scope="module")
def address(folder, plugins):
    """`rlinf serve` in a thread."""
    policy = load_policy(folder, plugins=plugins)
    ready, stopping, where = threading.Event(), [], []

    def note(port):
        where.append(port)
        ready.set()

    async def run():
        server = PolicyServer(policy, describe_policy(policy, folder))
        stopping.extend((asyncio.get_running_loop(), server.stop))
        await server.run("127.0.0.1", 0, note)

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    assert ready.wait(60)
    yield f"ws://127.0.0.1:{where[0]}"
    stopping[0].call_soon_threadsafe(stopping[1].set)
    thread.join(30)


def evaluated(capsys, *arguments):
    code = cli.main(["eval", *map(str, arguments)])
    out, err = capsys.readouterr()
    assert code == 0, err
    return out


OFFLINE = ("--split", "train", "--samples", "6", "--batch-size", "1", "--json")


def test_offline_errors_are_those_of_the_process(folder, address, capsys):
    here = json.loads(evaluated(capsys, folder, *OFFLINE))
    there = json.loads(evaluated(capsys, folder, "--server", address, *OFFLINE))
    assert there == here
    fewer = json.loads(evaluated(capsys, folder, "--server", address, "--num-steps", "1", *OFFLINE))
    assert fewer == json.loads(evaluated(capsys, folder, "--num-steps", "1", *OFFLINE))
    assert fewer["errors"]["rmse"] != here["errors"]["rmse"]


def test_ways_of_sampling_are_compared_on_the_same_rows(folder, capsys):
    rows = ("--split", "train", "--samples", "4")
    out = json.loads(evaluated(capsys, folder, *rows, "--sampling", "fp32:2,fp32:1,bf16:2,fp32:2", "--json"))
    table = {row[0]: row for row in out["table"]["rows"]}
    assert list(table) == ["fp32:2", "fp32:1", "bf16:2"]
    assert table["fp32:2"][2:4] == [0, 0]
    for way, *options in (("fp32:2",), ("fp32:1", "--num-steps", "1"), ("bf16:2", "--dtype", "bf16")):
        alone = json.loads(evaluated(capsys, folder, *rows, "--batch-size", "1", *options, "--json"))
        error = alone["tables"]["overall"]["rows"][0][1]
        assert table[way][1] == pytest.approx(error["value"] if isinstance(error, dict) else error, rel=1e-5)
    assert table["fp32:1"][3] > table["bf16:2"][3] > 0
    assert "times as fast" in evaluated(capsys, folder, *rows, "--sampling", "fp32:1")


WAYS = [
    ("fp16:5", (), "'fp16:5' is not a dtype and a number"),
    ("fp32:0", (), "'fp32:0' is not"),
    ("fp32:500", (), "must be a whole number from 1 to 100"),
    ("fp32:5", ("--dtype", "bf16"), "--dtype: leave it out with --sampling"),
    ("fp32:5", ("--batch-size", "2"), "--batch-size: leave it out with --sampling"),
    ("fp32:5", ("--env", "sawyer"), "--sampling is for recorded episodes"),
]


@pytest.mark.parametrize(("ways", "options", "message"), WAYS)
def test_other_ways_are_refused(folder, capsys, ways, options, message):
    chosen = () if "--env" in options else ("--split", "train")
    assert cli.main(["eval", str(folder), *chosen, "--sampling", ways, *options]) == 2
    assert message in capsys.readouterr().err


SIMULATOR = ("--env", "sawyer", "--tasks", "reach", "--episodes", "2", "--processes", "1", "--baselines", "none")
FAST = ("--set", "env.horizon=12", "--set", "env.action_repeat=1", "--replan", "2", "--videos", "0", "--json")


def trajectories(capsys, *arguments):
    """What each episode came to: its best reward is a number of the whole path."""
    found = json.loads(evaluated(capsys, *arguments, *SIMULATOR, *FAST))
    return [{key: value for key, value in one.items() if key != "seconds"} for one in found["episodes"]]


def test_simulated_episodes_are_those_of_the_process(folder, address, capsys):
    here = trajectories(capsys, folder)
    assert len(here) == 2
    assert trajectories(capsys, folder, "--server", address) == here
    assert trajectories(capsys, "--server", address) == here  # The folder is not needed.
    assert trajectories(capsys, "--server", address, "--seed", "5") != here


@pytest.fixture
def foreign():
    """A server of another project: openpi's names, nothing about the policy, no seeds, replies without a state."""
    seen = []

    def handle(connection):
        connection.send(pack({}))
        for message in connection:
            observation = unpack(message)
            seen.append(observation)
            if "observation/state" not in observation:
                connection.send("Traceback (most recent call last): KeyError")
            else:
                actions = np.full((5, 4), observation["observation/state"][0], np.float64)
                connection.send(pack({"actions": actions}))

    with serve_sync(handle, "127.0.0.1", 0, compression=None, max_size=None) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"ws://127.0.0.1:{server.socket.getsockname()[1]}", seen
        server.shutdown()
        thread.join(30)


def test_another_projects_server_acts_and_the_output_says_that_it_draws_for_itself(folder, foreign, capsys):
    address, seen = foreign
    out = evaluated(capsys, folder, "--server", address, *OFFLINE[:-1])
    assert "this server does not accept seeds" in out
    assert seen[0].keys() == {"observation/image", "observation/state", "prompt"}
    assert not {"noise", "seed", "draw"} & seen[0].keys()
    out = evaluated(capsys, "--server", address, "--format", "pi05_metaworld", *SIMULATOR, *FAST[:-1])
    assert "this server does not accept seeds" in out
    assert seen[-1]["observation/state"].shape == (4,)
    assert isinstance(seen[-1]["prompt"], str)


def test_what_a_server_refuses_is_one_message(foreign, capsys):
    assert cli.main(["eval", "--server", foreign[0], *SIMULATOR, *FAST]) == 2
    err = capsys.readouterr().err
    assert "refused an observation: Traceback" in err
    assert err.count("\n") < 6


WRONG = [
    (["--split", "train"], "name the policy to evaluate"),
    (["FOLDER", "--format", "pi05_libero"], "--format is for a server"),
    (["FOLDER", "--server", "ADDRESS", "--dtype", "bf16"], "--dtype is chosen where the server is started"),
    (["--server", "ADDRESS"], "also name the exported folder that it serves"),
    (["--server", "ws://127.0.0.1:9", "--env", "sawyer"], "there is no policy server at ws://127.0.0.1:9"),
    (["FOLDER", "--server", "FOREIGN", "--num-steps", "3"], "does not let requests choose their denoising steps"),
    (["OTHER", "--server", "ADDRESS"], "serves another policy than the folder"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_mistakes_are_one_message(folder, address, foreign, tmp_path, monkeypatch, capsys, arguments, message):
    import shutil

    from rlinf_core.serving import remote

    monkeypatch.setattr(remote, "WAIT", 0.1)
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    described = json.loads((other / "rlinf.json").read_text())
    described["sha256"] = dict.fromkeys(described["sha256"], "0" * 64)
    (other / "rlinf.json").write_text(json.dumps(described))
    places = {"FOLDER": folder, "ADDRESS": address, "FOREIGN": foreign[0], "OTHER": other}
    assert cli.main(["eval", *(str(places.get(one, one)) for one in arguments)]) == 2
    assert message in capsys.readouterr().err


REPLIES = [
    pack({"actions": np.zeros((0, 4))}),
    pack({"actions": "no"}),
    pack({"state": 1}),
    b"\xc1",
    msgpack.packb([1]),
    "text",
]


@pytest.mark.parametrize("reply", REPLIES)
def test_a_server_that_replies_with_something_else_is_one_message(reply, capsys):
    def handle(connection):
        connection.send(pack({}))
        for _ in connection:
            connection.send(reply)

    with serve_sync(handle, "127.0.0.1", 0, compression=None) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        address = f"ws://127.0.0.1:{server.socket.getsockname()[1]}"
        assert cli.main(["eval", "--server", address, *SIMULATOR, *FAST]) == 2
        server.shutdown()
        thread.join(30)
    assert f"the server at {address}" in capsys.readouterr().err
