"""The hook of this package."""

from __future__ import annotations

from rlinf_core import EnvironmentConfig, hookimpl
from rlinf_plugins_gymnasium.config import GymnasiumConfig


@hookimpl
def rlinf_register_environments() -> list[type[EnvironmentConfig]]:
    """The environment `gymnasium`."""
    return [GymnasiumConfig]
