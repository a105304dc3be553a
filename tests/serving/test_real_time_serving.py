"""Real-time chunking over the wire: a client that asks early, and a server that continues what it executes."""

import time

import numpy as np
import pytest
from test_serve import NOISE, Running, observation, policy  # noqa: F401  # The fixture.

from rlinf_client import OverlappedBroker, PolicyClient, ServerError
from rlinf_core.contract.continuation import Continuation
from rlinf_core.serving.description import describe_policy


@pytest.fixture(scope="module")
def address(policy, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("policy")
    (folder / "rlinf.json").write_text("{}")
    server = Running(policy, metadata=describe_policy(policy, folder))
    yield server.address
    server.stop()
    server.thread.join(30)


def row():
    sent = observation()
    return {
        "observation.image": sent["observation/image"],
        "observation.state": sent["observation/state"],
        "task": "push",
    }


def test_a_chunk_that_continues_another_is_the_policys(address, policy):  # noqa: F811
    with PolicyClient(address) as client:
        assert client.metadata["real_time_chunking"] == {"guided": 5}
        left = client.infer(observation(), noise=NOISE)["actions"][2:]
        options = {"prev_chunk_left_over": left, "inference_delay": 2, "execution_horizon": 3}
        tuned = {"max_guidance_weight": 10.0, "prefix_attention_schedule": "LINEAR", "real_time_chunking": "guided"}
        own, other = (client.infer(observation(), noise=NOISE, **options, **more)["actions"] for more in ({}, tuned))
    wanted = policy.infer(row(), NOISE, continuing=Continuation(left, 2, execution_horizon=3))
    np.testing.assert_array_equal(own, wanted)
    linear = Continuation(left, 2, "guided", execution_horizon=3, max_guidance_weight=10.0, schedule="linear")
    np.testing.assert_array_equal(other, policy.infer(row(), NOISE, continuing=linear))
    assert np.abs(own - other).max() > 1e-4


def test_keys_without_a_value_are_no_continuation(address, policy):  # noqa: F811
    """lerobot's loops send None with the first observation."""
    with PolicyClient(address) as client:
        sent = client.infer(observation(), noise=NOISE, prev_chunk_left_over=None, inference_delay=None)["actions"]
    np.testing.assert_array_equal(sent, policy.infer(row(), NOISE))


LEFT = np.zeros((3, 4), np.float32)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"inference_delay": 3}, "'inference_delay' without 'prev_chunk_left_over'"),
        ({"prev_chunk_left_over": LEFT}, "'prev_chunk_left_over' without 'inference_delay'"),
        ({"execution_horizon": 3}, "without 'prev_chunk_left_over' and 'inference_delay'"),
        (
            {"prev_chunk_left_over": LEFT, "inference_delay": 4},
            "the delay is 4, but must be a whole number from 0 to 3",
        ),
        ({"prev_chunk_left_over": LEFT[:, :3], "inference_delay": 1}, r"\[3, 3\], but must be at most 5 actions of 4"),
        ({"prev_chunk_left_over": "all", "inference_delay": 1}, r"but must be \[T, D\]"),
        ({"prev_chunk_left_over": [[0, 1], [2]], "inference_delay": 1}, r"is not an array of numbers \[T, D\]"),
        ({"prev_chunk_left_over": LEFT * np.nan, "inference_delay": 1}, "NaN or infinity"),
        ({"prev_chunk_left_over": LEFT, "inference_delay": 1, "real_time_chunking": "trained"}, "not offer 'trained'"),
        ({"prev_chunk_left_over": LEFT, "inference_delay": "1"}, "the delay is '1'"),
    ],
)
def test_a_wrong_request_is_one_message_and_the_connection_stays(address, keys, message):
    with PolicyClient(address) as client:
        with pytest.raises(ServerError, match=message) as caught:
            client.infer(observation(), **keys)
        assert "Traceback" not in str(caught.value)
        assert client.infer(observation())["actions"].shape == (5, 4)


class Offering:
    """Chunks [10, 1] whose numbers are the tick that they belong to, plus 1000 for every chunk."""

    def __init__(self, *ways, seconds=0.0):
        self.metadata = {"real_time_chunking": dict.fromkeys(ways, 10)} if ways else {}
        self.asked, self.seconds = [], seconds

    def infer(self, seen, **options):
        self.asked.append((seen["tick"], options))
        number = len(self.asked) - 1
        time.sleep(self.seconds if number else 0.0)
        return {"actions": 1000.0 * number + seen["tick"] + np.arange(10.0)[:, None]}


@pytest.mark.parametrize("way", ["guided", "trained", "auto"])
@pytest.mark.parametrize("delay", [0, 1, 3, 5])
def test_a_broker_sends_what_is_left_and_the_delay(way, delay):
    broker = OverlappedBroker(
        Offering("guided", "trained"), execute=5, way=way, simulated_delay=delay, options={"max_guidance_weight": 8.0}
    )
    given = [broker.act({"tick": tick})[0] for tick in range(40)]
    assert [one % 1000 for one in given] == list(range(40))
    asked = broker.policy.asked
    assert asked[0] == (0, {})
    for tick, options in asked[1:]:
        assert options["inference_delay"] == delay
        assert options["real_time_chunking"] == way
        assert options["max_guidance_weight"] == 8.0
        assert options["prev_chunk_left_over"][0, 0] % 1000 == tick
        assert len(options["prev_chunk_left_over"]) == 5
    assert broker.stalls == 0
    broker.close()


def test_a_broker_asks_before_the_chunk_would_end():
    """Ten actions and a delay of five: after five, although nine were to be executed first."""
    broker = OverlappedBroker(Offering("guided"), execute=9, simulated_delay=5)
    given = [broker.act({"tick": tick})[0] for tick in range(40)]
    assert [one % 1000 for one in given] == list(range(40))
    assert [tick for tick, _ in broker.policy.asked[:3]] == [0, 5, 10]
    assert broker.stalls == 0
    broker.close()


def test_the_expected_delay_is_the_longest_of_the_latest():
    broker = OverlappedBroker(Offering("guided"), execute=2, expected_delay=3)
    assert broker.expected_delay == 3
    broker._delays.extend([1, 4, 2])
    assert broker.expected_delay == 4
    broker._delays.extend([1] * 10)
    assert broker.expected_delay == 1
    broker.close()


def test_a_delay_is_measured_in_ticks_of_real_time():
    broker = OverlappedBroker(Offering("guided", seconds=0.1), execute=4)
    for tick in range(12):
        broker.act({"tick": tick})
        time.sleep(0.02)
    broker.close()
    assert broker._delays
    assert 2 <= broker.expected_delay <= 6


def test_without_real_time_chunking_the_robot_switches_and_says_what_is_possible():
    assert OverlappedBroker(Offering(), execute=2).way == "switch"
    with pytest.raises(ValueError, match="does not offer 'guided' real-time chunking; possible: switch"):
        OverlappedBroker(Offering(), execute=2, way="guided")
    with pytest.raises(ValueError, match="'trained' real-time chunking; possible: guided, switch"):
        OverlappedBroker(Offering("guided"), execute=2, way="trained")
    broker = OverlappedBroker(Offering("guided"), execute=5, way="switch", simulated_delay=2)
    for tick in range(20):
        broker.act({"tick": tick})
    assert all(options == {} for _, options in broker.policy.asked)
    broker.close()


def test_a_robot_moves_on_real_time_chunks_of_a_real_server(address):
    with PolicyClient(address) as client:
        broker = OverlappedBroker(client, execute=2)
        assert broker.way == "auto"
        actions = [broker.act(observation()) for _ in range(8)]
        broker.close()
    assert np.isfinite(actions).all()
    assert broker.chunks >= 3
