"""The plugin's hooks."""

from __future__ import annotations

from rlinf_core import EnvironmentConfig, hookimpl
from rlinf_plugins_libero.config import CONFIGS


@hookimpl
def rlinf_register_environments() -> list[type[EnvironmentConfig]]:
    """Register an environment for each suite of LIBERO and LIBERO-PRO."""
    return list(CONFIGS)
