"""The pieces of core's trainer, for a trainer of another kind: docs/trainers.md puts them together.

Importing this module loads torch. A trainer's config class, which is loaded before, derives from
`rlinf_core.Fsdp2Settings` or `rlinf_core.TrainerConfig` and imports this module in `build`. In the order of a run: its
data, what a step changes, where it continues, what is reported, a step, and how it stops.
"""

from rlinf_core.training.checkpoint.load import load as load_checkpoint
from rlinf_core.training.checkpoint.manager import Checkpoints
from rlinf_core.training.data import RunData
from rlinf_core.training.monitor.monitor import Monitor
from rlinf_core.training.state.build import TrainState, build_state, open_weights
from rlinf_core.training.state.fsdp import local_shard, release
from rlinf_core.training.step import TrainStep
from rlinf_core.training.stopping import StopSignal, stop_signals
from rlinf_core.training.trainer import Fsdp2Trainer

__all__ = [
    "Checkpoints",
    "Fsdp2Trainer",
    "Monitor",
    "RunData",
    "StopSignal",
    "TrainState",
    "TrainStep",
    "build_state",
    "load_checkpoint",
    "local_shard",
    "open_weights",
    "release",
    "stop_signals",
]
