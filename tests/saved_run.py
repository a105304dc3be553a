"""A run's folder as its trainer leaves it, with given weights and without training."""

from rlinf_core.config.load import dump_config
from rlinf_core.data.normalize import save_norm_stats
from rlinf_core.training.checkpoint import Checkpoints
from rlinf_core.training.fsdp import layout
from rlinf_core.training.position import Position
from rlinf_core.training.resume import Start


def save_run(run, parameters, stats, group):
    """Write config, statistics and a checkpoint of step 0, by the trainer's own functions; returns the run's folder.

    `parameters`: the policy's own names -> tensors. `group`: the processes that hold them.
    """
    run.folder.mkdir(parents=True)
    (run.folder / "config.toml").write_text(dump_config(run))
    save_norm_stats(run.folder / "norm_stats.json", stats)
    position = Position(step=0, epoch=0, sample=0, rows=1, seed=run.seed, layout=layout(parameters.items()))
    tensors = {f"model.{name}": tensor.detach() for name, tensor in parameters.items()}
    checkpoints = Checkpoints.of(run, group, tensors, Start())
    checkpoints.save(position)
    checkpoints.finish()
    return run.folder
