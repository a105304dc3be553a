"""Train the toy policy on several ranks, with the evaluator `simulator` in the toy simulator."""

from pathlib import Path

import toy_policy
import toy_simulator
from distributions import entry_point, repository_entry_points

from rlinf_core.config.load import load_config
from rlinf_core.plugins.registry import DATASET_GROUP, PLUGIN_GROUP, Plugins
from rlinf_core.training.distributed.processes import processes
from rlinf_core.training.run_folder import prepare_folder


def main(arguments):
    folder, config, *options = arguments
    plugins = Plugins(
        [
            *repository_entry_points(),
            entry_point(PLUGIN_GROUP, "toy", toy_policy, "toy-policy"),
            entry_point(DATASET_GROUP, "toy", toy_policy.TrainableToyDataset, "toy-policy"),
            entry_point(PLUGIN_GROUP, "line", toy_simulator, "line"),
        ]
    )
    folder = Path(folder)
    run = load_config(config, [f"runner.output_dir={folder.parent}", f"runner.name={folder.name}", *options], plugins)
    with processes("cpu") as group:
        start = group.decide(lambda: prepare_folder(run, overwrite=False))
        run.trainer.build(run, start=start, group=group, plugins=plugins).train()
