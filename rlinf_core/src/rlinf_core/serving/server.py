"""A policy's websocket server: openpi's protocol at `/`, vla-eval's at `/vla-eval`, health and metrics over HTTP.

What a client can do is bounded: sizes of messages, clients, waiting requests. It gets an error in words, never a
traceback, and stays connected. Web pages are refused (they send an `Origin`), so that no site that the user visits
reaches a server on the loopback interface.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from typing import Any

from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from rlinf_client.wire import WireError, pack, unpack
from rlinf_core.errors import UserError
from rlinf_core.inference import LoadedPolicy
from rlinf_core.serving.engine import BusyError, Computed, Engine
from rlinf_core.serving.metrics import Metrics
from rlinf_core.serving.vla_eval import VLA_EVAL, Session, answer

LOOPBACK = ("127.0.0.1", "::1", "localhost")
PING_SECONDS, PONG_SECONDS = 30, 120
"""A client that compiles or simulates may not answer for a minute."""


@dataclass(frozen=True)
class Limits:
    """What clients may use."""

    message_bytes: int = 32 * 2**20
    clients: int = 64
    waiting: int = 64
    batch: int = 8
    drain_seconds: float = 20.0


class PolicyServer:
    """Serve a policy until `stop` is set.

    Args:
        policy: What acts.
        metadata: The first message to openpi's clients.
        api_key: What clients must send as `Authorization: Api-Key KEY`; empty: any may connect.
        limits: Bounds.
        first: What to compute before listening, in the thread that computes requests: `warm_up`; returns seconds.
        log: Called with a line for each event that an operator should know.
    """

    def __init__(
        self,
        policy: LoadedPolicy,
        metadata: Mapping[str, Any],
        *,
        api_key: str = "",
        limits: Limits = Limits(),  # noqa: B008  # It is frozen.
        first: Callable[[], float] = lambda: 0.0,
        log: Callable[[str], object] = print,
    ) -> None:
        self._first, self._key, self.limits, self._log = pack(metadata), api_key.encode(), limits, log
        self.metrics = Metrics()
        self._engine = Engine(
            policy,
            most_waiting=limits.waiting,
            most_together=limits.batch,
            failed=self._log_defect,
            first=first,
        )
        self._working = 0
        self._draining = False
        self.stop = asyncio.Event()

    async def run(self, host: str, port: int, ready: Callable[[int], object]) -> None:
        """Listen; `ready` gets the port. Ends once all requests that were accepted have been answered.

        Raises:
            OSError: The address is taken.
        """
        logging.getLogger("websockets.server").setLevel(logging.CRITICAL)  # Garbage on a port is no traceback.
        try:
            if not await self._warmed():
                return
            async with serve(
                self._session,
                host,
                port,
                compression=None,
                max_size=self.limits.message_bytes,
                max_queue=2,
                write_limit=2**20,
                ping_interval=PING_SECONDS,
                ping_timeout=PONG_SECONDS,
                process_request=self._request,
                server_header=None,
            ) as server:
                ready(next(iter(server.sockets)).getsockname()[1])
                await self.stop.wait()
                await self._drain(server)
        finally:
            await asyncio.to_thread(self._engine.close)

    async def _warmed(self) -> bool:
        """Wait until requests can be computed; False: the server is to stop before that."""
        warmed, stop = asyncio.wrap_future(self._engine.warmed), asyncio.ensure_future(self.stop.wait())
        await asyncio.wait((warmed, stop), return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        if not warmed.done():
            return False
        if seconds := warmed.result():
            self._log(f"one chunk takes {seconds * 1e3:.0f} ms")
        return True

    async def _drain(self, server: Server) -> None:
        """Refuse what comes, wait for what is being computed, then close all connections."""
        self._draining = True
        deadline = time.monotonic() + self.limits.drain_seconds
        while self._working and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        server.close()

    def _request(self, connection: ServerConnection, request: Request) -> Response | None:
        """Answer HTTP requests, and refuse those that may not connect; None: go on with the handshake."""
        path = request.path.partition("?")[0]
        if path == "/healthz":
            return _respond(connection, *((503, "stopping\n") if self._draining else (200, "OK\n")))
        if path == "/health":
            return _respond(connection, 503 if self._draining else 200, json.dumps({"status": "ok"}) + "\n")
        if "Origin" in request.headers:
            return _respond(connection, 403, "web pages may not connect\n")
        given = request.headers.get_all("Authorization")
        sent = given[0].encode("utf-8", "surrogateescape") if len(given) == 1 else b""
        if self._key and not hmac.compare_digest(sent, b"Api-Key " + self._key):
            return _respond(connection, 401, "the API key is missing or wrong\n")
        if path == "/metrics":
            return _respond(connection, 200, self.metrics.text(self._engine.waiting))
        if path not in ("/", VLA_EVAL):
            return _respond(connection, 404, f"openpi's clients connect to /, vla-eval to {VLA_EVAL}\n")
        if self._draining or self.metrics.clients >= self.limits.clients:
            return _respond(connection, 503, "the server takes no more clients\n")
        return None

    async def _session(self, connection: ServerConnection) -> None:
        self.metrics.clients += 1
        address = connection.remote_address or ("?", 0)
        client = f"{address[0]}:{address[1]}"
        try:
            if connection.request is not None and connection.request.path.partition("?")[0] == VLA_EVAL:
                await self._vla_eval(connection, client)
            else:
                await self._openpi(connection, client)
        except ConnectionClosed:
            pass
        except Exception as error:
            self._log_defect(error)
        finally:
            self.metrics.clients -= 1

    async def _openpi(self, connection: ServerConnection, client: str) -> None:
        """The server speaks first; then each binary message is an observation, each reply a result or a text."""
        await connection.send(self._first)
        total: float | None = None
        async for message in connection:
            start = time.perf_counter()
            self._working += 1
            try:
                if isinstance(message, str):
                    self.metrics.outcomes["malformed"] += 1
                    await connection.send("an observation is a binary msgpack message, not text")
                    continue
                found = await self._compute(partial(unpack, message))
                if isinstance(found, str):
                    await connection.send(found)
                    continue
                reply = _result(found, total)
                await connection.send(pack(reply))
                total = time.perf_counter() - start
                self.metrics.answered(client, total, found.seconds)
            finally:
                self._working -= 1

    async def _vla_eval(self, connection: ServerConnection, client: str) -> None:
        """The client speaks first; every message has a type and a number, which the reply repeats."""

        async def act(observation: Any) -> Computed | str:
            return await self._compute(lambda: observation)

        session = Session()
        async for message in connection:
            start = time.perf_counter()
            self._working += 1
            try:
                reply, found = await answer(message, session, act)
                if reply is not None:
                    await connection.send(reply)
                if found is not None:
                    self.metrics.answered(client, time.perf_counter() - start, found.seconds)
            finally:
                self._working -= 1

    async def _compute(self, observation: Callable[[], Any]) -> Computed | str:
        """The result, or the text of an error."""
        if self._draining:
            return "the server is stopping: connect again later"
        try:
            return await self._engine.infer(observation())
        except WireError as error:
            outcome, text = "malformed", str(error)
        except BusyError as error:
            outcome, text = "busy", str(error)
        except UserError as error:
            outcome, text = "refused", str(error)
        self.metrics.outcomes[outcome] += 1
        return text

    def _log_defect(self, error: Exception) -> None:
        self.metrics.outcomes["failed"] += 1
        logging.getLogger(__name__).error("a request failed", exc_info=error)


def _result(found: Computed, total: float | None) -> dict[str, Any]:
    timing = {"infer_ms": found.seconds * 1e3, "batch": found.batch}
    if total is not None:
        timing["prev_total_ms"] = total * 1e3
    result = {"actions": found.actions, "policy_timing": {"infer_ms": found.seconds * 1e3}, "server_timing": timing}
    # A list: openpi's `ActionChunkBroker` takes every array of a result for one entry per action, and indexes it.
    return result if found.state is None else {**result, "state": found.state.tolist()}


def _respond(connection: ServerConnection, status: int, text: str) -> Response:
    return connection.respond(HTTPStatus(status), text)
