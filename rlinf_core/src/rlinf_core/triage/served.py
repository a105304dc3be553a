"""A policy server as triage asks it: training rows in the form of observations, answered with actions."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from importlib.util import find_spec
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from rlinf_core.contract.datasets import DatasetConfig
from rlinf_core.contract.weights.origin import DESCRIPTION
from rlinf_core.errors import UserError
from rlinf_core.triage.mistakes.rows import Vectors

if TYPE_CHECKING:
    from rlinf_client import PolicyClient

WAIT, REPLY = 10.0, 120.0
"""Seconds for a connection, and for a reply: the first may compile."""
OURS = "rlinf-core"


class Served:
    """A connection to a server that speaks openpi's protocol; a context manager.

    Args:
        address: `ws://host:port`.
        data: The policy's dataset, which names the columns of an observation.
        api_key: The server's key, if it has one.

    Raises:
        UserError: There is no such server, or rlinf-client is not installed.
    """

    def __init__(self, address: str, data: DatasetConfig, api_key: str = "") -> None:
        if missing := [name for name in ("websockets", "msgpack", "rlinf_client") if find_spec(name) is None]:
            raise UserError(f"--server needs {' and '.join(missing)}: pip install 'rlinf-core[serve]'")
        from rlinf_client import PolicyClient

        self.address, self._data = address, data
        self._open = ExitStack()
        try:
            self._client: PolicyClient = self._open.enter_context(
                PolicyClient(address, api_key=api_key, wait=WAIT, timeout=REPLY)
            )
        except ConnectionError as error:
            raise UserError(f"--server {address}: {error}") from error
        self.metadata: Mapping[str, Any] = self._client.metadata

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    @property
    def takes_noise(self) -> bool:
        """Whether the server computes actions from given noise, as `rlinf serve` does."""
        return str(self.metadata.get("server", "")).startswith(OURS)

    def act(self, row: Mapping[str, Any], noise: Vectors | None) -> Vectors:
        """[H, D], the server's actions for a training row without its actions.

        Raises:
            UserError: The server refused the observation, or is gone.
        """
        from rlinf_client import ServerError

        sent = {key: row[key] for key in self._data.observation_columns() or row if key in row}
        if not self.takes_noise:
            sent = self._other_names(sent)
        options = {"noise": noise} if self.takes_noise and noise is not None else {}
        try:
            reply = self._client.infer(sent, **options)
        except ServerError as error:
            raise UserError(f"the server refused a training row as an observation: {error}") from error
        except ConnectionError as error:
            raise UserError(f"--server {self.address}: {error}") from error
        actions = np.asarray(reply.get("actions"), np.float64)
        if actions.ndim != 2 or not actions.size:
            raise UserError(f"the server answered with actions {list(actions.shape)}, not [steps, numbers]")
        return actions

    def _other_names(self, sent: Mapping[str, Any]) -> dict[str, Any]:
        """The observation under the columns' names, and under those that robots and simulators use."""
        found: dict[str, Any] = dict(sent)
        for name, column in self._data.observation_names().items():
            if column in sent:
                found[name] = sent[column]
                *folders, last = name.split("/")
                inner: Any = found
                for folder in folders:
                    inner = inner.setdefault(folder, {}) if isinstance(inner, dict) else None
                if isinstance(inner, dict):  # A column may have the name of a folder.
                    inner.setdefault(last, sent[column])
        return found

    def other_files(self, description: Mapping[str, Any]) -> list[str]:
        """Files of the folder that are not those that the server has loaded, by their hashes."""
        here, there = description.get("sha256", {}), self.metadata.get("sha256", {})
        if not isinstance(here, Mapping) or not isinstance(there, Mapping):
            return []
        return sorted(name for name in here.keys() & there.keys() if here[name] != there[name] and name != DESCRIPTION)
