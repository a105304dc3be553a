"""A connection to a policy server: `rlinf serve`, or openpi's own."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Any

from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, InvalidURI
from websockets.sync.client import ClientConnection, connect

from rlinf_client.contract import compare
from rlinf_client.timing import Timing
from rlinf_client.wire import WireError, pack, unpack

AGAIN = 0.5
"""Seconds between attempts to connect."""


class ServerError(RuntimeError):
    """The server refused a request. The text is the server's message; the connection can be used further."""


class PolicyClient:
    """Ask a served policy for action chunks. Not safe to use from several threads at once.

    Args:
        address: `ws://host:port`; `wss://` with TLS. A bare `host:port` means `ws://`.
        api_key: The server's key, if it has one.
        wait: Seconds to wait for a server that is not there yet: policies take minutes to load.
        timeout: Seconds to wait for a reply.

    Raises:
        ConnectionError: There is no such server, it refuses the key, or it speaks another protocol.
    """

    def __init__(
        self, address: str = "ws://127.0.0.1:8000", *, api_key: str = "", wait: float = 0.0, timeout: float = 60.0
    ) -> None:
        self.address = address if "://" in address else f"ws://{address}"
        self.timeout = timeout
        self._headers = {"Authorization": f"Api-Key {api_key}"} if api_key else None
        self.round_trips = Timing()
        """From sending an observation to having its actions."""
        self.inferences = Timing()
        """The server's own measurement of computing them."""
        self._open = ExitStack()
        self._connection = self._connect(time.monotonic() + wait)
        self.metadata: Mapping[str, Any] = self._first_message()
        """What the server says about the policy: cameras, names, horizon; see `rlinf serve`."""

    def infer(self, observation: Mapping[str, Any], **options: Any) -> dict[str, Any]:
        """Ask for a chunk of actions.

        Args:
            observation: Images uint8 [height, width, 3], state vectors, and the text `prompt`, under the names that the
                server's `metadata` lists.
            options: More keys of the request. Servers of `rlinf serve` know `num_steps`, denoising steps; `noise`
                [H, A], standard normal numbers; or `seed`, whole numbers, and `draw`, the number of the chunk since
                then: the same chunk gets the same noise. For real-time chunking `prev_chunk_left_over` [T, D],
                `inference_delay` and others.

        Returns:
            `actions` [H, D] in the robot's units, `state`, a list of S numbers as they were sent, and timings.

        Raises:
            ServerError: The server refused the observation.
            WireError: The reply is not a message of this protocol.
            ConnectionError: The connection is gone, or there was no reply within `timeout`: connect again.
        """
        start = time.perf_counter()
        try:
            self._connection.send(pack({**observation, **options}))
            reply = self._connection.recv(timeout=self.timeout)
        except TimeoutError as error:
            self.close()  # A late reply would be taken for that of the next request.
            raise ConnectionError(f"{self.address} did not reply within {self.timeout:g} seconds") from error
        except ConnectionClosed as error:
            raise ConnectionError(f"{self.address} closed the connection: {error}") from error
        if isinstance(reply, str):
            raise ServerError(reply)
        result: dict[str, Any] = unpack(reply)
        if not isinstance(result, dict):
            raise WireError(f"the reply is a {type(result).__name__}, not a map")
        self.round_trips.add(time.perf_counter() - start)
        if "infer_ms" in (timing := result.get("server_timing", {})):
            self.inferences.add(timing["infer_ms"] / 1e3)
        return result

    def compare(self, observation: Mapping[str, Any], rate_hz: float | None = None) -> list[str]:
        """Compare an observation, and the rate at which a robot acts, with what the policy was trained on.

        Args:
            observation: As `infer` takes it; nothing is sent.
            rate_hz: Actions per second of the robot.

        Returns:
            What may be intended: other sizes of images, another task, another rate. One sentence each.

        Raises:
            ValueError: What the server would refuse or misunderstand: missing names, values of other shapes.
        """
        return compare(self.metadata, observation, rate_hz)

    def reset(self) -> None:
        """Nothing: the server keeps no state of an episode. As in openpi's client."""

    def close(self) -> None:
        """Close the connection."""
        self._open.close()

    def __enter__(self) -> PolicyClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _connect(self, deadline: float) -> ClientConnection:
        while True:
            try:
                opened = connect(
                    self.address, compression=None, max_size=None, additional_headers=self._headers, proxy=None
                )
                return self._open.enter_context(opened)
            except InvalidStatus as error:
                status = error.response.status_code
                if status == 503 and time.monotonic() < deadline:
                    time.sleep(AGAIN)
                    continue
                reason = {401: "it needs another api_key", 503: "it takes no more clients"}.get(status, "")
                raise ConnectionError(f"{self.address} refused the connection ({status}): {reason}") from error
            except (OSError, InvalidHandshake, InvalidURI, ValueError) as error:
                if isinstance(error, OSError) and time.monotonic() < deadline:
                    time.sleep(AGAIN)
                    continue
                raise ConnectionError(
                    f"there is no policy server at {self.address} ({error}): is it running, and reachable from here?"
                ) from error

    def _first_message(self) -> Mapping[str, Any]:
        try:
            first = self._connection.recv(timeout=self.timeout)
            found = unpack(first) if isinstance(first, bytes) else None
        except (TimeoutError, ConnectionClosed, WireError) as error:
            self.close()
            raise ConnectionError(f"{self.address} does not speak openpi's protocol ({error})") from error
        if not isinstance(found, Mapping):
            self.close()
            raise ConnectionError(f"{self.address} does not speak openpi's protocol: its first message is not a map")
        return found
