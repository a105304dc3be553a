"""The hooks of this distribution, registered through the entry point `rlinf-plugins-trackers`."""

from __future__ import annotations

from rlinf_core import Command, LoggerConfig, hookimpl
from rlinf_plugins_trackers.config import TRACKERS


@hookimpl
def rlinf_register_loggers() -> list[type[LoggerConfig]]:
    """Register the loggers `tensorboard`, `wandb`, `swanlab` and `trackio`."""
    return [*TRACKERS.values()]


@hookimpl
def rlinf_register_commands() -> list[Command]:
    """Register `rlinf track`."""
    return [Command("track", "log a run's folder to a tracker, or what it lacks", "rlinf_plugins_trackers.track")]
