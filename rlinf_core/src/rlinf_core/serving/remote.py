"""A policy that a server computes, for evaluations: `rlinf serve`, or another server with openpi's protocol."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlinf_client.client import PolicyClient, ServerError
from rlinf_client.wire import WireError
from rlinf_core.contract.datasets import DatasetConfig
from rlinf_core.errors import UserError
from rlinf_core.exported import Exported
from rlinf_core.rollout.pool import Asking
from rlinf_core.rollout.seeds import seed_of
from rlinf_core.serving.observations import DRAW, SEED, STEPS

WAIT = 10.0
"""Seconds to wait until there is a server."""
SECONDS = 600.0
"""How long to wait for a reply: a server that compiles takes minutes."""


class RemotePolicy:
    """Connections to a server; use it as a context manager.

    Args:
        address: `ws://host:port`.
        api_key: The server's key; empty: none.
        opened: The exported folder that the server serves, if there is one here.
        format: The dataset format whose names of observations the server knows; None: that of the folder, or none.
        steps: Denoising steps; None: the server's.
        wait: Seconds to wait until there is a server; None: `WAIT`.

    Raises:
        UserError: There is no such server, it does not know steps, or it serves another policy than the folder.
    """

    def __init__(
        self,
        address: str,
        *,
        api_key: str = "",
        opened: Exported | None = None,
        format: DatasetConfig | None = None,
        steps: int | None = None,
        wait: float | None = None,
    ) -> None:
        self.address, self.opened, self.steps = address, opened, steps
        self._data = format or (opened.data if opened else None)
        self._open = ExitStack()
        self._clients: list[PolicyClient] = []
        self._connect = partial(
            PolicyClient, address, api_key=api_key, wait=WAIT if wait is None else wait, timeout=SECONDS
        )
        self.metadata = dict(self._client(0).metadata)
        accepts = self.metadata.get("accepts")
        self.accepts = frozenset(map(str, accepts)) if isinstance(accepts, Sequence) else frozenset()
        """What a request may choose: `noise`, `seed`, `num_steps`; nothing of another project's server."""
        if steps is not None and STEPS not in self.accepts:
            raise UserError(f"--num-steps: the server at {address} does not let requests choose their denoising steps")
        if opened is not None:
            _check_same(self.metadata, opened, address)

    def __enter__(self) -> RemotePolicy:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def infer(
        self, observations: Sequence[Mapping[str, Any]], options: Sequence[Mapping[str, Any]]
    ) -> list[NDArray[np.floating]]:
        """Chunks of actions [H, D] in the data's units, asked for at the same time.

        Args:
            observations: Rows in the dataset's format.
            options: Keys of each request beside its observation.

        Raises:
            UserError: The server refused an observation, left, or replied with something else.
        """
        clients = [self._client(number) for number in range(len(observations))]
        work = [
            (client, self._request(seen, chosen))
            for client, seen, chosen in zip(clients, observations, options, strict=True)
        ]
        if len(work) == 1:
            return [self._ask(*work[0])]
        with ThreadPoolExecutor(len(work)) as threads:
            return list(threads.map(self._ask, *zip(*work, strict=True)))

    def _client(self, number: int) -> PolicyClient:
        try:
            while len(self._clients) <= number:
                self._clients.append(self._open.enter_context(self._connect()))
        except ConnectionError as error:
            raise UserError(f"--server: {error}") from error
        return self._clients[number]

    def _request(self, seen: Mapping[str, Any], chosen: Mapping[str, Any]) -> dict[str, Any]:
        """The observation under the names that the server knows, and what of the options it accepts."""
        options = {**chosen, **({} if self.steps is None else {STEPS: self.steps})}
        accepted = {name: value for name, value in options.items() if name in self.accepts or name == DRAW}
        if SEED not in accepted:
            accepted.pop(DRAW, None)
        columns = self.metadata.get("observation_columns")
        if isinstance(columns, Sequence) and not isinstance(columns, str):
            wanted = [*map(str, columns), "task"]
            return {name: seen[name] for name in wanted if name in seen} | accepted
        return foreign_names(self._data, seen) | accepted

    def _ask(self, client: PolicyClient, request: Mapping[str, Any]) -> NDArray[np.floating]:
        try:
            reply = client.infer(request)
        except ServerError as error:
            raise UserError(f"the server at {self.address} refused an observation: {error}") from error
        except (ConnectionError, WireError) as error:
            raise UserError(f"the server at {self.address}: {error}") from error
        actions = np.asarray(reply.get("actions"))
        if actions.ndim != 2 or actions.dtype.kind != "f" or not actions.size:
            raise UserError(
                f"the server at {self.address} replied with actions of shape {list(actions.shape)}, {actions.dtype}: a "
                "chunk is [H, D], numbers"
            )
        return actions


def foreign_names(data: DatasetConfig | None, seen: Mapping[str, Any]) -> dict[str, Any]:
    """A row under the names of another project's servers: openpi's, where the format has them; the task is `prompt`.

    Of a known format only observations are sent, not recorded actions.
    """
    first: dict[str, str] = {}
    for name, column in (data.observation_names() if data else {}).items():
        first.setdefault(column, name)
    known = (*data.observation_columns(), "task") if data and data.observation_columns() else tuple(seen)
    names = {column: first.get(column, column) for column in known} | {"task": "prompt"}
    sent: dict[str, Any] = {}
    for column in known:
        value = seen.get(column)
        if isinstance(value, (np.ndarray, np.generic, str, int, float)):
            name = names[column]
            inside = sent.setdefault("images", {}) if name.startswith("images/") else sent
            inside[name.removeprefix("images/")] = value
    return sent


def _check_same(metadata: Mapping[str, Any], opened: Exported, address: str) -> None:
    """Raise `UserError` if the server's files are not those of the folder."""
    served, here = metadata.get("sha256"), opened.description.get("sha256")
    if not isinstance(served, Mapping) or not isinstance(here, Mapping):
        return
    if differ := [name for name in here if str(served.get(name)) != str(here[name])]:
        raise UserError(
            f"--server: {address} serves another policy than the folder, whose {', '.join(sorted(differ))} differ: "
            "name the folder that it serves"
        )


@dataclass
class ServedAgent:
    """Lets a server act in a simulator, with the noise that the policy would draw in this process."""

    remote: RemotePolicy
    replan: int
    """Actions of a chunk to execute; 0: all."""
    looks: bool = True
    _asked: dict[tuple[str, str, int], int] = field(default_factory=dict)
    """Chunks of each episode so far."""

    def __call__(self, asking: Sequence[Asking]) -> list[NDArray[np.floating]]:
        """The first actions of the server's chunks."""
        options = []
        for one in asking:
            draw = 0 if one.steps == 0 else self._asked.get(one.episode.key, 0)
            self._asked[one.episode.key] = draw + 1
            options.append({SEED: list(seed_of(one.episode)), DRAW: draw})
        chunks = self.remote.infer([one.observation or {} for one in asking], options)
        return [chunk[: self.replan or None] for chunk in chunks]
