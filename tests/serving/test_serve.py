"""`rlinf serve` and rlinf-client: what a robot gets is what the policy computes, and no client can break the server."""

import asyncio
import threading
import urllib.error
import urllib.request
from contextlib import suppress
from dataclasses import replace

import msgpack
import numpy as np
import pytest
import torch
import websockets.sync.client as ws

from rlinf_client import ChunkBroker, OverlappedBroker, PolicyClient, ServerError
from rlinf_client.wire import WireError, pack, unpack
from rlinf_core import cli
from rlinf_core.config.load import load_config
from rlinf_core.data.normalize import NormStats
from rlinf_core.data.pipeline import build_pipeline
from rlinf_core.exported import CheckTrainingState
from rlinf_core.inference import LoadedPolicy
from rlinf_core.rollout.seeds import generator_of
from rlinf_core.serving.server import Limits, PolicyServer

IMAGE = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
NOISE = np.random.default_rng(1).standard_normal((5, 8), np.float32)


def observation(**changes):
    return {"observation/image": IMAGE, "observation/state": np.full(4, 0.1, np.float32), "prompt": "push"} | changes


@pytest.fixture(scope="module")
def policy():
    """The dummy π0.5 with random weights."""
    run = load_config("examples/quickstart.toml", ["policy.action_dim=8", "policy.num_sampling_steps=2"])
    torch.manual_seed(0)
    module = run.policy.build()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.05)
    spread = NormStats(mean=np.zeros(4), std=np.ones(4), q01=-np.ones(4), q99=np.ones(4))
    pipeline = build_pipeline(run.data, run.policy, {"state": spread, "actions": spread})
    pipeline = replace(pipeline, dataset=(*pipeline.dataset, CheckTrainingState(4)))  # As `load_policy` does.
    return LoadedPolicy(run.policy, run.data, pipeline, module.eval())


class Running:
    """A server in a thread."""

    def __init__(self, policy, **settings):
        self.ready = threading.Event()
        self.thread = threading.Thread(target=lambda: asyncio.run(self.serve(policy, settings)))
        self.thread.start()
        assert self.ready.wait(30)

    async def serve(self, policy, settings):
        metadata = settings.pop("metadata", {"policy": "pi05"})
        self.server, self.loop = PolicyServer(policy, metadata, **settings), asyncio.get_running_loop()
        await self.server.run("127.0.0.1", 0, self.note)

    def note(self, port):
        self.port, self.address = port, f"ws://127.0.0.1:{port}"
        self.ready.set()

    def stop(self):
        with suppress(RuntimeError):  # It has ended already.
            self.loop.call_soon_threadsafe(self.server.stop.set)

    def get(self, path, **headers):
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", headers=headers)
        try:
            with urllib.request.urlopen(request) as reply:
                return reply.status, reply.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()


@pytest.fixture
def start(policy):
    servers = []

    def start(policy=policy, **settings):
        servers.append(Running(policy, **settings))
        return servers[-1]

    yield start
    for one in servers:
        one.stop()
        one.thread.join(30)
        assert not one.thread.is_alive()


def test_a_client_gets_the_actions_that_the_policy_computes(start, policy):
    with PolicyClient(start().address) as client:
        assert client.metadata["policy"] == "pi05"
        first = client.infer(observation(), noise=NOISE)
        second = client.infer(observation(), noise=NOISE)
    row = {"observation.image": IMAGE, "observation.state": np.full(4, 0.1, np.float32), "task": "push"}
    np.testing.assert_array_equal(first["actions"], policy.infer(row, NOISE))
    assert first["state"] == row["observation.state"].tolist()  # Arrays are indexed by openpi's broker.
    assert first["server_timing"]["infer_ms"] > 0
    assert "prev_total_ms" not in first["server_timing"]
    assert second["server_timing"]["prev_total_ms"] > 0
    assert client.round_trips.count == 2


@pytest.mark.parametrize(
    "given",
    [
        {"observation/image": IMAGE.transpose(2, 0, 1)},
        {"observation/image": IMAGE.astype(np.float64) / 255 + 1e-9 * (IMAGE < 255)},
        {"observation/state": [0.1] * 4},
        {"prompt": np.str_("push")},
    ],
)
def test_other_layouts_are_the_same_observation(start, given):
    with PolicyClient(start().address) as client:
        expected = client.infer(observation(), noise=NOISE)["actions"]
        np.testing.assert_allclose(client.infer(observation(**given), noise=NOISE)["actions"], expected, atol=1e-4)


WRONG = [
    ({"prompt": None}, "'task'"),
    ({"observation/state": np.zeros(3)}, r"shape \[3\]"),
    ({"observation/state": np.array([0, np.nan, 0, 0])}, "NaN"),
    ({"observation/image": IMAGE[..., 0]}, "height, width, 3"),
    ({"observation/image": IMAGE.astype(np.float32)}, "0 to 1"),
    ({"noise": np.zeros((2, 2), np.float32)}, r"\[5, 8\]"),
    ({"num_steps": 0}, "num_steps is '0', but must be a whole number from 1 to 100"),
    ({"num_steps": 10**6}, "from 1 to 100"),
    ({"num_steps": np.array([1, 2])}, "from 1 to 100"),
    ({"num_steps": float("inf")}, "from 1 to 100"),
    ({"seed": "7"}, "must be a whole number from 0"),
    ({"seed": [1] * 9}, "list of up to 8"),
    ({"seed": -1}, "must be a whole number from 0"),
    ({"seed": 7, "draw": 10**9}, "below 10000"),
    ({"seed": 7, "noise": NOISE}, "send noise, or a seed"),
    ({"draw": 1}, "send noise, or a seed"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_a_wrong_observation_is_one_message_and_the_connection_stays(start, change, message):
    with PolicyClient(start().address) as client:
        with pytest.raises(ServerError, match=message) as caught:
            client.infer(observation(**change))
        assert "Traceback" not in str(caught.value)
        assert client.infer(observation())["actions"].shape == (5, 4)


def test_a_seed_draws_what_a_generator_of_an_episode_draws_in_process(start, policy):
    row = {"observation.image": IMAGE, "observation.state": np.full(4, 0.1, np.float32), "task": "push"}
    generator = generator_of([3, 1, 5])
    wanted = [policy.act([row], [generator])[0] for _ in range(4)]
    with PolicyClient(start().address) as client:
        got = [client.infer(observation(), seed=[3, 1, 5], draw=number)["actions"] for number in (0, 1, 2, 3, 1)]
        single = client.infer(observation(), seed=3)["actions"]
    np.testing.assert_array_equal(got, [*wanted, wanted[1]])
    np.testing.assert_array_equal(single, policy.act([row], [generator_of([3])])[0])


def test_requests_with_other_numbers_of_steps_are_computed_apart(start, policy):
    row = {"observation.image": IMAGE, "observation.state": np.full(4, 0.1, np.float32), "task": "push"}
    slow = Slow(policy)
    running = start(slow)
    clients = [PolicyClient(running.address) for _ in range(4)]
    threads = [in_thread(lambda: clients[0].infer(observation(), noise=NOISE)["actions"])]
    assert slow.begun.wait(10)
    for client, steps in zip(clients[1:], (1, 5, 1), strict=True):
        threads.append(in_thread(lambda c=client, n=steps: c.infer(observation(), noise=NOISE, num_steps=n)["actions"]))
    while running.server._engine.waiting < 3:
        pass
    slow.go.set()
    results = []
    for thread, found in threads:
        thread.join(30)
        results += found
    assert sorted(slow.batches) == [1, 1, 2]
    encoded = policy.encode(row)
    for got, steps in zip(results, (2, 1, 5, 1), strict=True):
        np.testing.assert_allclose(got, policy.act_on([encoded], [NOISE], None, steps)[0], atol=1e-5)
    assert np.abs(results[1] - results[2]).max() > 1e-3
    for client in clients:
        client.close()


def test_missing_names_are_all_listed(start):
    with PolicyClient(start().address) as client, pytest.raises(ServerError) as caught:
        client.infer({"observation/imag": IMAGE, "prompt": "push"})
    assert "'observation.image'" in str(caught.value)
    assert "'observation.state'" in str(caught.value)
    assert "observation/imag" in str(caught.value)


def test_a_defect_stays_on_the_server(start, policy, monkeypatch):
    monkeypatch.setattr(policy, "act_on", lambda *_: 1 / 0)
    running = start()
    with PolicyClient(running.address) as client, pytest.raises(ServerError, match="its log has the reason") as caught:
        client.infer(observation())
    assert "division" not in str(caught.value)
    assert 'outcome="failed"} 1' in running.get("/metrics")[1]


GARBAGE = [
    b"",
    b"\xc1",
    b"\x93\x01",
    msgpack.packb([1, 2]),
    msgpack.packb({"a": msgpack.ExtType(5, b"x")}),
    b"\x91" * 3000 + b"\x01",
    msgpack.packb({b"__ndarray__": True, b"data": b"x" * 8, b"dtype": "|O", b"shape": [1]}),
    msgpack.packb({b"__ndarray__": True, b"data": b"", b"dtype": "<f4", b"shape": [2**40, 2**40, 0]}),
    msgpack.packb({b"__ndarray__": True, b"data": b"", b"dtype": "<f4", b"shape": [2**40]}),
    msgpack.packb({b"__ndarray__": True, b"data": b"", b"dtype": "f4,O", b"shape": [0]}),
    msgpack.packb([[]] * 60_000),
    "text",
]


def test_garbage_is_answered_and_survived(start):
    with ws.connect(start().address, proxy=None) as connection:
        connection.recv()
        for message in GARBAGE:
            connection.send(message)
            reply = connection.recv(timeout=10)
            assert isinstance(reply, str), message[:20]
            assert "Traceback" not in reply
        connection.send(pack(observation()))
        assert unpack(connection.recv(timeout=30))["actions"].shape == (5, 4)


def test_oversize_messages_end_that_connection_alone(start):
    running = start(limits=Limits(message_bytes=20_000))
    with PolicyClient(running.address) as client, pytest.raises(ConnectionError, match="1009"):
        client.infer({"observation/image": np.zeros((200, 200, 3), np.uint8)})
    with PolicyClient(running.address) as client:
        assert client.infer(observation())["actions"].shape == (5, 4)


def test_the_key_is_checked_and_health_needs_none(start):
    running = start(api_key="secret")
    for wrong in ("", "secre", "secret2", "Secret"):
        with pytest.raises(ConnectionError, match="401"):
            PolicyClient(running.address, api_key=wrong)
    assert running.get("/healthz") == (200, "OK\n")
    assert running.get("/metrics")[0] == 401
    with PolicyClient(running.address, api_key="secret") as client:
        assert client.infer(observation())["actions"].shape == (5, 4)


def test_web_pages_are_refused(start):
    with pytest.raises(Exception, match="403"):
        ws.connect(start().address, additional_headers={"Origin": "http://example.com"})


def test_more_clients_than_allowed_are_refused(start):
    running = start(limits=Limits(clients=1))
    with PolicyClient(running.address), pytest.raises(ConnectionError, match="503"):
        PolicyClient(running.address)


class Slow:
    """A policy that waits until it may go on."""

    def __init__(self, policy):
        self.policy, self.data, self.config, self.go = policy, policy.data, policy.config, threading.Event()
        self.begun, self.batches = threading.Event(), []

    def encode(self, row):
        return self.policy.encode(row)

    def act_on(self, samples, noises=None, previous=None, steps=None):
        self.begun.set()
        assert self.go.wait(30)
        self.batches.append(len(samples))
        return self.policy.act_on(samples, noises, previous, steps)


def in_thread(work):
    found = []

    def note():
        try:
            found.append(work())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=note)
    thread.start()
    return thread, found


def test_what_was_accepted_is_answered_before_the_server_ends(start, policy):
    slow = Slow(policy)
    running = start(slow)
    with PolicyClient(running.address) as client:
        thread, found = in_thread(lambda: client.infer(observation())["actions"].shape)
        assert slow.begun.wait(10)
        running.stop()
        slow.go.set()
        thread.join(30)
        running.thread.join(30)
    assert found == [(5, 4)]
    assert not running.thread.is_alive()


def test_a_client_that_leaves_and_a_full_queue_cost_the_others_nothing(start, policy):
    slow = Slow(policy)
    running = start(slow, limits=Limits(waiting=1))
    gone, waits, busy = (PolicyClient(running.address) for _ in range(3))
    gone._connection.send(pack(observation()))
    assert slow.begun.wait(10)
    gone._connection.socket.close()
    thread, found = in_thread(lambda: waits.infer(observation())["actions"].shape)
    while not running.server._engine.waiting:
        pass
    with pytest.raises(ServerError, match="busy"):
        busy.infer(observation())
    slow.go.set()
    thread.join(30)
    assert found == [(5, 4)]
    assert busy.infer(observation())["actions"].shape == (5, 4)
    waits.close(), busy.close()


def test_requests_that_wait_together_are_one_batch(start, policy):
    slow = Slow(policy)
    running = start(slow)
    clients = [PolicyClient(running.address) for _ in range(4)]
    first = in_thread(lambda: clients[0].infer(observation(), noise=NOISE)["actions"])
    assert slow.begun.wait(10)
    others = [in_thread(lambda c=c: c.infer(observation(), noise=NOISE)["actions"]) for c in clients[1:]]
    while running.server._engine.waiting < 3:
        pass
    slow.go.set()
    results = []
    for thread, found in (first, *others):
        thread.join(30)
        results += found
    assert slow.batches == [1, 3]
    for one in results[1:]:
        np.testing.assert_allclose(one, results[0], atol=1e-5)
    for client in clients:
        client.close()


def test_vla_eval_messages_get_one_action_each(start, policy):
    def message(kind, payload, number):
        return pack({"type": kind, "payload": payload, "seq": number, "timestamp": 0.0}, "vla-eval")

    seen = {"images": {"agentview": IMAGE}, "states": np.full(4, 0.1), "task_description": "push", "noise": NOISE}
    with ws.connect(f"{start().address}/vla-eval") as connection:
        connection.send(message("hello", {}, 1))
        assert unpack(connection.recv(timeout=10))["payload"]["protocol_version"] == 1
        connection.send(message("episode_start", {}, 2))
        actions = []
        for number in range(3, 9):
            connection.send(message("observation", seen, number))
            reply = unpack(connection.recv(timeout=30))
            assert (reply["type"], reply["seq"]) == ("action", number)
            actions.append(reply["payload"]["actions"])
        connection.send(b"\xc1")
        assert unpack(connection.recv(timeout=10))["type"] == "error"
    row = {"observation.image": IMAGE, "observation.state": np.full(4, 0.1, np.float32), "task": "push"}
    expected = policy.infer(row, NOISE)
    np.testing.assert_allclose(actions, [*expected, expected[0]], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("value", [object(), np.array([None]), np.array([1j]), {"a": np.datetime64("2020-01-01")}])
def test_what_is_not_numbers_or_text_is_not_sent(value):
    with pytest.raises(WireError):
        pack(value)


class Counting:
    """Chunks [10, 1] whose numbers are the tick that they belong to, plus 1000 for every chunk."""

    def __init__(self):
        self.asked = []

    def infer(self, seen):
        self.asked.append(seen["tick"])
        return {"actions": 1000.0 * (len(self.asked) - 1) + seen["tick"] + np.arange(10.0)[:, None]}


def test_a_chunk_broker_gives_the_first_actions_of_each_chunk():
    broker = ChunkBroker(Counting(), execute=4)
    assert [broker.act({"tick": t})[0] % 1000 for t in range(12)] == list(range(12))
    assert broker.policy.asked == [0, 4, 8]


@pytest.mark.parametrize("delay", [0, 1, 3, 5])
def test_actions_are_those_of_their_tick_whatever_the_delay(delay):
    broker = OverlappedBroker(Counting(), execute=5, simulated_delay=delay)
    given = [broker.act({"tick": t})[0] for t in range(40)]
    assert [one % 1000 for one in given] == list(range(40))
    switches = [t for t in range(1, 40) if given[t] // 1000 != given[t - 1] // 1000]
    assert len(switches) > 3
    assert switches == [tick + delay for tick in broker.policy.asked[1:]][: len(switches)]
    assert broker.stalls == 0
    broker.close()


def test_other_machines_need_a_key(tmp_path, capsys):
    assert cli.main(["serve", str(tmp_path), "--host", "0.0.0.0"]) == 2
    assert "lets other machines move the robot: set RLINF_API_KEY" in capsys.readouterr().err
