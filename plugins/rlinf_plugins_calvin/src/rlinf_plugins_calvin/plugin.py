"""The plugin's hook."""

from __future__ import annotations

from rlinf_core import EnvironmentConfig, hookimpl
from rlinf_plugins_calvin.config import CalvinConfig


@hookimpl
def rlinf_register_environments() -> list[type[EnvironmentConfig]]:
    """The environment `calvin`."""
    return [CalvinConfig]
