"""Ranks for test_trainer_options.py: one process group, many runs, each with different trainer options.

Arguments are `FOLDER CONFIG NAME:key=value,... ...`: each named run trains a few steps and leaves
`FOLDER/NAME/{start,end,ema}.safetensors`, `rows.json`, and what it sent in `sent.json`.
"""

import contextlib
import json
from collections import Counter
from pathlib import Path

import toy_policy
from distributions import entry_point, repository_entry_points
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

from rlinf_core.config.load import load_config
from rlinf_core.loggers.jsonl import read_rows
from rlinf_core.plugins.registry import DATASET_GROUP, PLUGIN_GROUP, Plugins
from rlinf_core.training.distributed.processes import processes
from rlinf_core.training.resume import Start


class Sent(TorchDispatchMode):
    """Counts collectives by name."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation.namespace in ("c10d", "_c10d_functional"):
            self.counts[operation.name()] += 1
        return operation(*args, **(kwargs or {}))


def whole(tensors):
    return {name: getattr(t.detach(), "full_tensor", t.detach)().clone().contiguous() for name, t in tensors}


def train(run, plugins, group, folder):
    trainer = run.trainer.build(run, start=Start(), group=group, plugins=plugins)
    parts = {"start": whole(trainer.policy.named_parameters())}
    # Counting costs a Python call an operation, and turns compilation off: only where a test asks for the counts.
    counted = run.trainer.activation_checkpointing == "none" or run.trainer.num_replicas not in ("auto", 1)
    asked = counted and not run.trainer.compile
    sent = Sent()
    with sent if asked else contextlib.nullcontext():
        trainer.train()
    parts["end"] = whole(trainer.policy.named_parameters())
    if trainer.ema:
        parts["ema"] = whole(trainer.ema.state_dict().items())
    if group.rank == 0:
        for name, tensors in parts.items():
            save_file(tensors, folder / f"{name}.safetensors")
        (folder / "sent.json").write_text(json.dumps(sent.counts))
        rows = read_rows(run.folder / "metrics.jsonl")
        (folder / "rows.json").write_text(json.dumps(rows))


def main(arguments):
    folder, config, *runs = arguments
    toys = [
        entry_point(PLUGIN_GROUP, "toy", toy_policy, "toy-policy"),
        entry_point(DATASET_GROUP, "toy", toy_policy.TrainableToyDataset, "toy-policy"),
    ]
    plugins = Plugins([*repository_entry_points(), *toys])
    with processes("cpu") as group:
        for text in runs:
            name, _, settings = text.partition(":")
            overrides = [f"runner.output_dir={folder}", f"runner.name={name}", *filter(None, settings.split(","))]
            train(load_config(config, overrides, plugins), plugins, group, Path(folder) / name)
