"""Serve the dummy π0.5 with random weights until standard input ends.

The first line of output is the port. Every line of input is answered with two numbers: seconds of processor time that
this process has used, and those of them that the policy has used.
"""

from __future__ import annotations

import asyncio
import sys
import time
from typing import Any

import numpy as np
import torch

from rlinf_core.config.load import load_config
from rlinf_core.data.normalize import NormStats
from rlinf_core.data.pipeline import build_pipeline
from rlinf_core.inference import LoadedPolicy
from rlinf_core.serving.server import PolicyServer

CONFIG = """
[runner]
name = "served"
max_steps = 1
[data]
config_name = "pi05_libero"
[policy]
variant = "dummy"
"""


def build_policy() -> LoadedPolicy:
    """Two cameras and 8 numbers of state, 7 of an action."""
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.toml"
        file.write_text(CONFIG)
        run = load_config(file)
    torch.manual_seed(0)
    module = run.policy.build()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.05)
    stats = {
        name: NormStats(mean=np.zeros(n), std=np.ones(n), q01=-np.ones(n), q99=np.ones(n))
        for name, n in (("state", 8), ("actions", 7))
    }
    return LoadedPolicy(run.policy, run.data, build_pipeline(run.data, run.policy, stats), module.eval())


class Counted:
    """A policy that counts the processor time of its calls."""

    def __init__(self, policy: LoadedPolicy) -> None:
        self.policy, self.data, self.config = policy, policy.data, policy.config
        self.seconds = 0.0

    def encode(self, row: Any) -> Any:
        return self._timed(self.policy.encode, row)

    def act_on(self, *given: Any) -> Any:
        return self._timed(self.policy.act_on, *given)

    def _timed(self, work: Any, *given: Any) -> Any:
        start = time.thread_time()
        found = work(*given)
        self.seconds += time.thread_time() - start
        return found


async def main() -> None:
    policy = Counted(build_policy())
    server = PolicyServer(policy, {"policy": "pi05"}, log=lambda text: None)  # type: ignore[arg-type]

    def answer() -> None:
        if not sys.stdin.readline():
            asyncio.get_running_loop().remove_reader(sys.stdin)
            server.stop.set()
            return
        print(time.process_time(), policy.seconds, flush=True)

    asyncio.get_running_loop().add_reader(sys.stdin, answer)
    await server.run("127.0.0.1", 0, lambda port: print(port, flush=True))


if __name__ == "__main__":
    torch.set_num_threads(1)
    asyncio.run(main())
