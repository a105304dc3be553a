"""Ranks for test_plan.py: one step of a run, and the bytes of its tensors and messages as JSON in `FOLDER/bytes.json`.

Arguments are `FOLDER CONFIG key=value ...`.
"""

import json
from collections import Counter
from pathlib import Path

import torch
from distributions import repository_entry_points
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rlinf_core.config.load import load_config
from rlinf_core.plugins.registry import Plugins
from rlinf_core.training.distributed.processes import processes
from rlinf_core.training.resume import Start


class Received(TorchDispatchMode):
    """Counts the bytes of collectives per rank: the output of a gather, the input of a reduction."""

    def __init__(self):
        super().__init__()
        self.bytes = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation.namespace in ("c10d", "_c10d_functional"):
            sizes = [t.nbytes for t in tree_leaves(args) if isinstance(t, torch.Tensor)]
            self.bytes[operation.name()] += max(sizes, default=0)
        return operation(*args, **(kwargs or {}))


def local(tensors):
    return sum(getattr(t.detach(), "to_local", t.detach)().nbytes for t in tensors)


def main(arguments):
    folder, config, *overrides = arguments
    plugins = Plugins(repository_entry_points())
    with processes("cpu") as group:
        run = load_config(config, [f"runner.output_dir={folder}", "runner.max_steps=1", *overrides], plugins)
        trainer = run.trainer.build(run, start=Start(), group=group, plugins=plugins)
        found = {"weights": local(trainer.policy.parameters())}
        step = trainer.optimizer.step

        def measured(*args, **kwargs):
            found["gradients"] = local(p.grad for p in trainer.policy.parameters() if p.grad is not None)
            return step(*args, **kwargs)

        trainer.optimizer.step = measured
        received = Received()
        with received:
            trainer.train()
        found["optimizer"] = local(trainer.optimizer.state_dict().values())
        found["ema"] = local(trainer.ema.state_dict().values())
        if group.rank == 0:
            Path(folder, "bytes.json").write_text(json.dumps({"states": found, "received": received.bytes}))
