"""Addresses of this machine, and which machines have come to a rendezvous."""

import socket
import time

import pytest

from rlinf_core.training.distributed import attendance, network
from rlinf_core.training.distributed.attendance import Attendance
from rlinf_core.training.distributed.network import Place, answers, choose_interface, is_here, place_towards


def test_a_machine_knows_its_own_addresses():
    assert is_here("localhost")
    assert is_here("127.0.0.1")
    assert not is_here(network.NOWHERE[0])
    assert not is_here("no-such-host.invalid")


def test_loopback_is_never_the_address_for_others(monkeypatch):
    monkeypatch.setattr(network, "_addresses", lambda: iter([("127.0.0.1", "lo"), ("10.0.0.1", "eth0")]))
    monkeypatch.setattr(network, "_routes", lambda host: iter(["127.0.0.1"] if host == "node0" else []))
    monkeypatch.setattr(network, "_resolve", lambda host: iter([(socket.AF_INET, "127.0.1.1")]))
    assert place_towards("node0") == Place("10.0.0.1", "eth0")  # As on Debian, without a default route.
    monkeypatch.setattr(network, "_addresses", lambda: iter([("127.0.0.1", "lo")]))
    assert place_towards("node0") is None


def test_the_interface_is_that_of_the_route_unless_the_user_has_named_one(monkeypatch):
    monkeypatch.setattr(network, "place_towards", lambda host: Place("10.0.0.1", "ib0"))
    environment = {}
    choose_interface(environment, "node0")
    assert environment == {network.INTERFACE: "ib0"}
    named = {network.INTERFACE: "eth1"}
    assert choose_interface(named, "node0") is None
    assert named == {network.INTERFACE: "eth1"}


@pytest.fixture
def port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_a_port_answers_once_somebody_listens(port):
    assert not answers("127.0.0.1", port, 0.0)
    with socket.create_server(("127.0.0.1", port)):
        assert answers("127.0.0.1", port, 0.0)


def test_machines_that_are_there_are_counted_and_those_that_have_left_are_not(port, monkeypatch):
    from torch.distributed import TCPStore

    monkeypatch.setattr(attendance, "BEAT", 0.1)
    store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)

    def machine(address):
        return Attendance(
            *("127.0.0.1", port),
            **{"run": "run", "address": address, "machines": 3, "report": print, "patience": 60.0, "lost": print},
        )

    def wait_for(entry, store=store):
        end = time.monotonic() + 60
        while not store.check([f"rlinf/machines/run/{entry}"]):
            assert time.monotonic() < end
            time.sleep(0.05)

    with machine("10.0.0.1") as one:
        wait_for(1)
        with machine("10.0.0.2"):
            wait_for(2)
            assert one.present().startswith("2 of 3 machines are there: ")
            assert "(10.0.0.1), " in one.present()
        assert "1 of 3 machines is there: " in one.present()
    del store


def test_a_rendezvous_that_is_gone_is_noticed(port, monkeypatch):
    monkeypatch.setattr(attendance, "PROBE", 0.05)
    monkeypatch.setattr(attendance.Attendance, "_attend", lambda self: None)
    lost = []
    server = socket.create_server(("127.0.0.1", port))
    with Attendance(
        *("127.0.0.1", port),
        **{
            "run": "run",
            "address": "",
            "machines": 2,
            "report": print,
            "patience": 0.2,
            "lost": lambda: lost.append(1),
        },
    ):
        time.sleep(0.5)
        server.close()
        end = time.monotonic() + 60
        while not lost and time.monotonic() < end:
            time.sleep(0.05)
    assert lost == [1]
