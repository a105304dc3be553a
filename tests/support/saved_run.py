"""A run's folder as its trainer leaves it: with given weights and without training, or with an empty checkpoint."""

from rlinf_core.config.load import dump_config
from rlinf_core.data.normalize import save_norm_stats
from rlinf_core.files import write_text
from rlinf_core.training.checkpoint.manager import Checkpoints
from rlinf_core.training.checkpoint.state import FileDigest, Position, State, dump_state
from rlinf_core.training.resume import Start
from rlinf_core.training.state.fsdp import layout


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


def checkpoint(run, step, validated=None, sample=0):
    """The files of a checkpoint that matter for starting a run."""
    path = run.folder / "checkpoints" / f"step_{step:09d}"
    path.mkdir(parents=True, exist_ok=True)
    at = step if validated is None else validated
    position = Position(step=step, epoch=0, sample=sample, rows=1, seed=0, layout="", validated=at)
    (path / "shard").write_bytes(b"abc")
    digests = {"shard": FileDigest(3, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")}
    write_text(path / "state.json", dump_state(State(position, digests)))
    write_text(run.folder / "latest", path.name)
    return path
