"""By which address and interface the other machines of a run reach this one. Torch-free.

A machine's own name is a bad answer: on Debian and Ubuntu it means 127.0.1.1, which gloo would then give to the others.
The address from which this machine reaches a common one, such as that of the rendezvous, is the right one.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import time
from collections.abc import Iterator, MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

INTERFACE = "GLOO_SOCKET_IFNAME"
"""Variable with which a user names gloo's interface."""
CONNECT = 5.0
"""Seconds that a connection may take."""
NOWHERE = ("198.51.100.1", "2001:db8::1")
"""Addresses of documentation, which nobody has: the way to them is the default route. Nothing is sent there."""
_GET_ADDRESS = 0x8915
"""Linux' ioctl SIOCGIFADDR."""


@dataclass(frozen=True)
class Place:
    """Where this machine is in the network."""

    address: str
    interface: str
    """Name of the network interface that has the address."""


def is_here(host: str) -> bool:
    """Whether a host name or address is one of this machine's: whether a socket can be bound to it."""
    for family, address in _resolve(host):
        with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as there:
            there.bind((address, 0))
            return True
    return False


def place_towards(host: str) -> Place | None:
    """How the machines that reach `host` reach this one; None if nothing but loopback leads there.

    Args:
        host: A name or an address. If it is this machine's own loopback address, which no other machine can use, the
            interface of the default route counts, or else the first one that is up.
    """
    for address in (*_routes(host), *(route for nowhere in NOWHERE for route in _routes(nowhere))):
        if not ip_address(address).is_loopback and (found := _interface_of(address)):
            return Place(address, found)
    if any(ip_address(address).is_loopback for _, address in _resolve(host)):
        return next((Place(*one) for one in _addresses() if not ip_address(one[0]).is_loopback), None)
    return None


def choose_interface(environment: MutableMapping[str, str], host: str) -> Place | None:
    """Set gloo's interface to the one that leads to `host`, unless the user has named one. Returns what was chosen."""
    if environment.get(INTERFACE):
        return None
    if place := place_towards(host):
        environment[INTERFACE] = place.interface
    return place


def answers(host: str, port: int, seconds: float) -> bool:
    """Whether something accepts connections at a port, within a time."""
    end = time.monotonic() + seconds
    while True:
        with suppress(OSError), socket.create_connection((host, port), timeout=CONNECT):
            return True
        if time.monotonic() >= end:
            return False
        time.sleep(min(0.5, seconds))


def _resolve(host: str) -> Iterator[tuple[socket.AddressFamily, str]]:
    with suppress(OSError, UnicodeError):
        for family, _, _, _, address in socket.getaddrinfo(host, None, type=socket.SOCK_DGRAM):
            yield family, str(address[0])


def _routes(host: str) -> Iterator[str]:
    """This machine's addresses on the way to a host; nothing is sent."""
    for family, address in _resolve(host):
        with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as there:
            there.connect((address, 9))
            yield str(there.getsockname()[0]).partition("%")[0]


def _interface_of(address: str) -> str:
    wanted = ip_address(address)
    return next((name for found, name in _addresses() if ip_address(found) == wanted), "")


def _addresses() -> Iterator[tuple[str, str]]:
    """(Address, interface) of this machine, IPv4 first."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", os.fsencode(name)[:15])
            with suppress(OSError):
                yield socket.inet_ntoa(fcntl.ioctl(any_socket, _GET_ADDRESS, request)[20:24]), name
    with suppress(OSError):
        for line in Path("/proc/net/if_inet6").read_text(encoding="ascii").splitlines():
            digits, *_, name = line.split()
            yield str(ip_address(bytes.fromhex(digits))), name
