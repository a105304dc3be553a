"""`rlinf eval --server`: the policy is on a server, with the real protocol between."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlinf_core.commands.serve import KEY, read_key
from rlinf_core.errors import UserError

if TYPE_CHECKING:
    from rlinf_core.exported import Exported
    from rlinf_core.plugins.registry import Plugins
    from rlinf_core.serving.remote import RemotePolicy

OF_A_POLICY_HERE = {"step": None, "best": False, "ema": None, "device": "auto", "dtype": "fp32"}
"""Options of a policy that is computed in this process, and their defaults."""


def add_server_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of a server."""
    group = parser.add_argument_group("on a server")
    group.add_argument(
        "--server",
        metavar="ws://HOST:PORT",
        help="let a server act: rlinf serve, or openpi's. POLICY is then the exported folder that it serves, or with "
        "--env left out",
    )
    group.add_argument("--api-key-file", metavar="FILE", help=f"the file with the server's key; default: ${KEY}")
    group.add_argument(
        "--format", metavar="NAME", help="of `rlinf datasets`: the names of observations that openpi's server knows"
    )


def check_policy_given(options: argparse.Namespace) -> None:
    """Raise `UserError` unless the options say where the policy is."""
    if not options.server:
        if given := next((name for name in ("api_key_file", "format") if getattr(options, name)), ""):
            raise UserError(f"--{given.replace('_', '-')} is for a server: add --server ws://HOST:PORT")
        if options.policy is None:
            raise UserError(
                "name the policy to evaluate: a run's folder or an exported one; or --server ws://HOST:PORT"
            )
        return
    if given := [name for name, default in OF_A_POLICY_HERE.items() if getattr(options, name) != default]:
        raise UserError(f"--{given[0]} is chosen where the server is started: leave it out with --server")
    if options.policy is None and not options.env:
        raise UserError(
            "--server: also name the exported folder that it serves, which says how recorded rows are compared; its "
            "weights are not loaded"
        )
    if missing := [name for name in ("websockets", "msgpack", "rlinf_client") if find_spec(name) is None]:
        raise UserError(f"--server needs {', '.join(missing)}: install rlinf-core[serve]")


@contextmanager
def served(
    options: argparse.Namespace, plugins: Plugins
) -> Iterator[tuple[RemotePolicy, Exported | None, dict[str, Any]]]:
    """Connect to the server.

    Yields:
        The server's policy, the exported folder that it serves (None: not named), and facts as `load_evaluated`.

    Raises:
        UserError: There is no such server, or it serves another policy than the folder.
    """
    from rlinf_core.exported import open_exported
    from rlinf_core.serving.remote import RemotePolicy
    from rlinf_core.untrusted.text import printable

    opened = open_exported(Path(options.policy), plugins, source=options.source) if options.policy else None
    format = None
    if options.format:
        format = plugins.dataset(options.format).model_validate({"config_name": options.format})
    with RemotePolicy(
        options.server,
        api_key=read_key(options),
        opened=opened,
        format=format,
        steps=options.num_steps,
    ) as remote:
        metadata, step = remote.metadata, remote.metadata.get("step")
        where = "" if metadata.get("sha256") else options.server  # Its files' hashes identify a policy anywhere.
        says = printable(str(metadata.get("server") or "another project's server"))
        notes = [f"{options.server}: {printable(str(metadata.get('policy') or 'a policy'))}, {says}"]
        if not remote.accepts:
            notes.append(
                "this server does not accept seeds: it draws its own noise, so results are not reproducible, and not "
                "those of the same policy in this process"
            )
        yield (
            remote,
            opened,
            {
                "step": step if isinstance(step, int) else None,
                "ema": metadata.get("weights") == "ema",
                "notes": notes,
                "run": None,
                "seed": 42 if options.seed is None else options.seed,
                "identity": json.dumps([where, metadata, options.num_steps], sort_keys=True, default=str).encode(),
            },
        )
