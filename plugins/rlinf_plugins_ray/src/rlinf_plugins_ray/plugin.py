"""The hooks of this distribution, registered through the entry point `rlinf-plugins-ray`."""

from __future__ import annotations

from collections.abc import Sequence

from rlinf_core import RunConfig, hookimpl

RAY = "ray"


@hookimpl
def rlinf_launcher_names() -> Sequence[str]:
    """Ray's."""
    return [RAY]


@hookimpl
def rlinf_launch(run: RunConfig, arguments: Sequence[str]) -> int | None:
    """Start the processes as workers of Ray Train, if `cluster.launcher` selects it."""
    if run.cluster.launcher != RAY:
        return None
    from rlinf_plugins_ray.launcher import launch

    return launch(run, arguments)


@hookimpl
def rlinf_describe_launch(run: RunConfig, arguments: Sequence[str]) -> str | None:
    """How many workers the run asks the Ray cluster for; does not connect to it."""
    if run.cluster.launcher != RAY:
        return None
    from rlinf_plugins_ray.launcher import describe

    return describe(run, arguments)
