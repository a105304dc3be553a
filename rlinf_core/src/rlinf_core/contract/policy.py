"""The config of a policy, which knows its data; `contract.module` is what the trainer asks of the module it builds.

Transforms, random draws and collation live on the config, because loader workers must not receive the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict

from rlinf_core.data.sample import Batch, Sample
from rlinf_core.data.transforms import Transform
from rlinf_core.errors import UserError
from rlinf_core.illustration import Illustration

if TYPE_CHECKING:
    import torch
    from torch import nn

    from rlinf_core.contract.datasets import DatasetConfig
    from rlinf_core.contract.module import WeightSource
    from rlinf_core.data.normalize import Stats


class PolicyConfig(BaseModel):
    """The `[policy]` table. A subclass narrows `type` to a `Literal` of its own and adds fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    run_defaults: ClassVar[Mapping[str, Any]] = {}
    """Defaults this policy sets for the run, as a TOML table: `{"optim": {"lr": 2.5e-5}}`."""
    normalization: ClassVar[Literal["mean_std", "quantile", "none"]] = "none"
    """How `state` and `actions` are normalised before `transforms()`."""
    export_formats: ClassVar[tuple[str, ...]] = ()
    """Other projects' layouts that `export` writes."""
    not_here: ClassVar[Mapping[str, str]] = {}
    """Types that people look for and that this policy's plugin does not bring -> what there is instead."""
    validation_metrics: ClassVar[Mapping[str, Callable[[Mapping[str, float]], float]]] = {}
    """What a validation reports besides its loss: name -> its value, of the held-out means of `loss` and of the
    policy's own metrics (`PolicyOutput.metrics`). Reported as `val_<name>`, and as `ema_val_<name>` of EMA weights."""
    larger_is_better: ClassVar[frozenset[str]] = frozenset()
    """Those of them that improve by growing. `runner.best_metric` takes the others only."""

    type: str
    """Which policy this is."""
    weights: str = ""
    """Pretrained weights: a folder or a file. `"random"`: train from the initialisation."""

    def chunk_length(self) -> int:
        """Number of actions a sample holds; 0 for policies without actions."""
        return 0

    def transforms(self) -> Sequence[Transform]:
        """Transforms after normalisation; the inverses run first, in reverse, on the policy's actions."""
        return ()

    def draw(self, generator: np.random.Generator) -> dict[str, Any]:
        """The random numbers of one training sample, to be merged into it.

        A policy with actions draws `noise`, [H, A] standard normal float32: validation samples actions from it.

        Args:
            generator: Keyed to (seed, epoch, position of the sample in the epoch), so that a sample's numbers do not
                depend on ranks, workers or resumes.
        """
        return {}

    def describe(self, samples: Iterable[Sample]) -> Mapping[str, str]:
        """What a user should know of the data before training: a short name of each fact -> a line of text.

        `rlinf validate` shows the facts, and so does a run when it starts.

        Args:
            samples: Encoded training rows from all over the data, without images and draws. They are made as they are
                asked for: a policy with nothing to tell need not look.
        """
        return {}

    def illustrate(self, sample: Sample, draws: Mapping[str, Mapping[str, Any]]) -> Illustration:
        """What the model is given of a sample, for the page of `rlinf inspect`: see `rlinf_core.illustration`.

        The page shows images before the model, all numbers and the trained actions by itself. What is left to the
        policy is what only it knows: images changed at random, tokens, masks.

        Args:
            sample: An encoded training row with its images, without draws.
            draws: What `draw` gives this row where the run meets it, the first times: `step 12 (epoch 0)` -> draws.
        """
        return Illustration()

    def data_layout(self, prompts: Iterable[str]) -> Mapping[str, Sequence[int]]:
        """What of the module's layout follows from a run's data: a name in words -> numbers; empty: nothing.

        Checkpoints keep it. A run goes on only where its data give the same.

        Args:
            prompts: The different ones of all training and held-out rows, read as they are asked for.
        """
        return {}

    def with_data_layout(self, layout: Mapping[str, Sequence[int]]) -> PolicyConfig:
        """The policy with what `data_layout` gave: it encodes the run's samples, builds and saves the module."""
        return self

    def shown(self) -> int:
        """How many held-out samples `Policy.demonstrate` gets after each validation; 0: it is not called."""
        return 0

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Stack samples into tensors on the CPU. Images stay uint8."""
        raise NotImplementedError(f"{type(self).__name__} must define collate()")

    def build(self) -> nn.Module:
        """Build the module, which follows `Policy`. Called under `torch.device("meta")`: allocate nothing by hand."""
        raise NotImplementedError(f"{type(self).__name__} must define build()")

    def build_to_count(self) -> nn.Module:
        """The module for `rlinf plan`, which counts on it what a step takes, on the meta device as `build`.

        A policy whose `build` reads files that do not change the module's size (a tokenizer, say) leaves them out.
        """
        return self.build()

    def largest_sample(self, cameras: Sequence[str]) -> Sample | None:
        """A made-up encoded sample, as long as any can be, without draws; None: only data tell.

        `rlinf plan` counts with it where the run's data are not at hand.

        Args:
            cameras: The policy's cameras that the dataset has.
        """
        return None

    def useful_flops(self, batch: Batch) -> float | None:
        """Operations that training on a batch is worth: what any implementation must do, forward and backward.

        Two for each multiply-add of matrix products and attention, over tokens that exist and reach the loss; nothing
        for padding, and nothing for what is computed again to save memory. A run's MFU is made of them. None: there is
        no formula, and what the policy computes is counted instead.

        Args:
            batch: As `collate` made it, still on the CPU: reading it waits for no device.
        """
        return None

    def published_name(self, name: str) -> str:
        """The name of a parameter in published weights. Initial values are keyed by it: it outlives refactoring."""
        return name

    def published_parts(self, name: str) -> Mapping[str, int]:
        """The published tensors that a parameter holds one below the other, from the top: name -> rows; empty: one.

        Each part has initial values of its own, keyed by its name, so that packing changes none.
        """
        return {}

    def check_files(self) -> None:
        """Raise `UserError` naming every file the policy needs and lacks. Leaves torch unloaded; reads headers at most.

        `rlinf validate` calls it. A policy whose `weights` are no path, or that needs other files, says so here.
        """
        if self.weights not in ("", "random") and not Path(self.weights).expanduser().exists():
            raise UserError(f"policy.weights: there is no file or folder {self.weights}")

    def unchecked_files(self) -> Sequence[str]:
        """What `check_files` could not look at, a sentence each: `rlinf validate` says so."""
        return ()

    def files(self) -> Mapping[str, str]:
        """Files besides the weights without which the policy cannot act: the field that names it -> its path.

        An exported policy carries copies.
        """
        return {}

    def exported(self) -> PolicyConfig:
        """The config of the exported policy, whose `weights` will name the exported folder.

        A policy whose `save_weights` puts more into the folder than weights leaves out what names it elsewhere: the
        folder is whole by itself, wherever it is moved.
        """
        return self

    def save_weights(self, tensors: Mapping[str, torch.Tensor], folder: Path) -> None:
        """Write whole tensors, by the module's own names, into a folder that `open_weights` reads."""
        raise NotImplementedError(f"{type(self).__name__} cannot save weights")

    def export(
        self, format: str, tensors: Mapping[str, torch.Tensor], folder: Path, sources: Sequence[TrainedOn]
    ) -> None:
        """Write the policy as another project's loader reads it.

        Args:
            format: One of `export_formats`.
            tensors: Whole tensors on the CPU by the module's own names, in the dtype to write.
            folder: An empty folder.
            sources: The datasets the policy was trained on: one, or several of a mixture. Where the format has a place
                for one only, raise `UserError` that says `--source NAME`.
        """
        raise NotImplementedError(f"{type(self).__name__} must define export() for its export_formats")

    def open_weights(self) -> WeightSource:
        """Open `weights` for reading; raise `UserError` that names every missing, unexpected or misshapen tensor."""
        raise NotImplementedError(f"{type(self).__name__} cannot load weights")


class TrainedOn(NamedTuple):
    """A dataset that a policy was trained on."""

    name: str
    """In the mixture; empty where it was the only one."""
    data: DatasetConfig
    stats: Stats | None
    """The statistics it was normalised with; None for policies that normalise nothing."""
