"""The hook of this package."""

from __future__ import annotations

from rlinf_core import EnvironmentConfig, hookimpl
from rlinf_plugins_metaworld.config import MetaworldConfig


@hookimpl
def rlinf_register_environments() -> list[type[EnvironmentConfig]]:
    """The environment `metaworld`."""
    return [MetaworldConfig]
