"""`rlinf serve`: answer observations of robots and simulators with an exported policy's actions."""

from __future__ import annotations

import argparse
import os
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from rlinf_core.commands.output import print_text
from rlinf_core.errors import UserError

KEY = "RLINF_API_KEY"
EPILOG = """\
Robots with openpi-client or rlinf-client connect to ws://HOST:PORT, vla-eval to ws://HOST:PORT/vla-eval. GET /healthz
answers once the policy is loaded, /metrics has counts and latencies for Prometheus.

The server listens on this machine only, unless --host says otherwise; it then needs an API key, in the environment
variable RLINF_API_KEY or in a file. SIGTERM and Ctrl-C let it answer what it has accepted, then exit with 0.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.epilog = EPILOG
    parser.add_argument("policy", help="a folder that `rlinf export` wrote")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; default: this machine only")
    parser.add_argument("--port", type=int, default=8000, help="default: 8000; 0: any free one, which is printed")
    parser.add_argument("--api-key-file", metavar="FILE", help=f"the file with the API key; default: ${KEY}")
    parser.add_argument("--no-api-key", action="store_true", help="let any machine that reaches --host connect")
    parser.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:1, ...")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="of matrix products; default: fp32")
    parser.add_argument("--num-steps", type=_positive, metavar="N", help="denoising steps; default: as in training")
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile the denoising step first, for minutes: faster, same actions",
    )
    parser.add_argument("--source", default="", metavar="NAME", help="the dataset of a mixture")
    parser.add_argument("--max-batch", type=_positive, default=8, metavar="N", help="requests per batch; default: 8")
    parser.add_argument("--max-waiting", type=_positive, default=64, metavar="N", help="requests that may wait")
    parser.add_argument("--max-clients", type=_positive, default=64, metavar="N", help="connections at a time")
    parser.add_argument("--max-message", type=_positive, default=32, metavar="MIB", help="size of a request in MiB")


def _positive(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def run(options: argparse.Namespace) -> None:
    """Load the policy, warm it up, and serve until a signal."""
    if missing := [name for name in ("websockets", "msgpack", "rlinf_client") if find_spec(name) is None]:
        raise UserError(f"rlinf serve needs {', '.join(missing)}: install rlinf-core[serve]")
    key = _api_key(options)
    from rlinf_core.plugins.registry import get_plugins
    from rlinf_core.terminal import print_phase, warn

    print_phase(f"loading {options.policy}")
    import asyncio
    import signal
    import warnings

    import torch

    from rlinf_core.inference import load_policy
    from rlinf_core.serving.description import describe_policy
    from rlinf_core.serving.server import Limits, PolicyServer
    from rlinf_core.serving.warm_up import warm_up

    folder = Path(options.policy)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if options.device == "auto" else options.device
    policy = load_policy(
        folder,
        device=device,
        dtype=options.dtype,
        plugins=get_plugins(),
        source=options.source,
        steps=options.num_steps,
        compile=options.compile,
    )
    if not policy.config.chunk_length():
        raise UserError(f"{folder}: the policy {policy.config.type!r} has no actions, which are what rlinf serve sends")
    if options.compile:
        print_phase("compiling")
    warnings.showwarning = lambda message, *_: warn(str(message))  # Without the line of code.
    limits = Limits(options.max_message * 2**20, options.max_clients, options.max_waiting, options.max_batch)

    async def serve() -> None:
        first = partial(warm_up, policy, options.max_batch)
        described = describe_policy(policy, folder)
        server = PolicyServer(policy, described, api_key=key, limits=limits, first=first, log=print_text)
        for one in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(one, server.stop.set)
        host = f"[{options.host}]" if ":" in options.host else options.host
        await server.run(options.host, options.port, lambda port: print_text(f"serving on ws://{host}:{port}"))
        print_text(f"{server.metrics.outcomes['ok']} requests answered")

    try:
        asyncio.run(serve())
    except OSError as error:
        raise UserError(
            f"cannot listen on {options.host}:{options.port} ({error.strerror or error}): choose another --port "
            "or --host"
        ) from error


def read_key(options: argparse.Namespace) -> str:
    """The key; empty if there is none. It is never an argument: others see those."""
    key = os.environ.get(KEY, "")
    if options.api_key_file:
        try:
            key = Path(options.api_key_file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--api-key-file {options.api_key_file} cannot be read: {error}") from error
        if not key:
            raise UserError(f"--api-key-file {options.api_key_file} is empty")
    if not key.isascii() or not key.isprintable():
        raise UserError("the API key must consist of printable ASCII characters")
    return key


def _api_key(options: argparse.Namespace) -> str:
    """The key; a server that other machines reach needs one."""
    key = read_key(options)
    if options.host not in ("127.0.0.1", "::1", "localhost") and not key and not options.no_api_key:
        raise UserError(
            f"--host {options.host} lets other machines move the robot: set {KEY} or --api-key-file, or allow any of "
            "them with --no-api-key"
        )
    return key
