"""The config of a policy, which knows its data; `contract.module` is what the trainer needs from the module it builds.

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
    """Run defaults set by this policy, as a TOML table: `{"optim": {"lr": 2.5e-5}}`."""
    normalization: ClassVar[Literal["mean_std", "quantile", "none"]] = "none"
    """How `state` and `actions` are normalised before `transforms()`."""
    export_formats: ClassVar[tuple[str, ...]] = ()
    """Other projects' layouts that `export` writes."""
    not_here: ClassVar[Mapping[str, str]] = {}
    """Policy types that users may expect and this policy's plugin does not have -> what to use instead."""
    validation_metrics: ClassVar[Mapping[str, Callable[[Mapping[str, float]], float]]] = {}
    """What a validation reports besides its loss: name -> function of the held-out means of `loss` and of the policy's
    own metrics (`PolicyOutput.metrics`). Reported as `val_<name>`, and as `ema_val_<name>` for EMA weights."""
    larger_is_better: ClassVar[frozenset[str]] = frozenset()
    """The `validation_metrics` of which larger values are better."""

    type: str
    """Which policy this is."""
    weights: str = ""
    """Pretrained weights: a folder or a file. `"random"`: train from random initialisation."""

    def chunk_length(self) -> int:
        """Number of actions in a sample; 0 for policies without actions."""
        return 0

    def transforms(self) -> Sequence[Transform]:
        """Transforms after normalisation; the inverses run first, in reverse, on the policy's actions."""
        return ()

    def draw(self, generator: np.random.Generator) -> dict[str, Any]:
        """Draw the random numbers of one training sample, which are merged into it.

        A policy with actions draws `noise`, [H, A], standard normal, float32; validation samples actions from it.

        Args:
            generator: Keyed by (seed, epoch, position of the sample in the epoch), so that a sample's random numbers
                do not depend on ranks, workers or resumes.
        """
        return {}

    def describe(self, samples: Iterable[Sample]) -> Mapping[str, str]:
        """Facts about the data that a user should know before training: short name -> one line of text.

        `rlinf validate` shows them, and so does a run when it starts.

        Args:
            samples: Encoded training rows spread over the data, without images and draws. They are encoded lazily: a
                policy that reports nothing costs nothing.
        """
        return {}

    def illustrate(self, sample: Sample, draws: Mapping[str, Mapping[str, Any]]) -> Illustration:
        """What the model gets from a sample, for the page of `rlinf inspect`: see `rlinf_core.illustration`.

        The page itself shows the images before the model, all numbers and the trained actions. The policy adds what
        only it knows: augmented images, tokens, masks.

        Args:
            sample: An encoded training row with its images, without draws.
            draws: The row's random numbers (`draw`) the first times the run uses it: `step 12 (epoch 0)` -> draws.
        """
        return Illustration()

    def data_layout(self, prompts: Iterable[str]) -> Mapping[str, Sequence[int]]:
        """What the module's layout takes from a run's data (e.g. embedding rows): descriptive name -> numbers.

        Checkpoints store it, and a run resumes only if its data still give the same layout. Empty: the layout does not
        depend on the data.

        Args:
            prompts: The distinct prompts of all training and held-out rows, read lazily.
        """
        return {}

    def with_data_layout(self, layout: Mapping[str, Sequence[int]]) -> PolicyConfig:
        """The policy bound to the result of `data_layout`; it encodes the samples, builds the module and saves it."""
        return self

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Stack samples into tensors on the CPU. Images stay uint8."""
        raise NotImplementedError(f"{type(self).__name__} must define collate()")

    def build(self) -> nn.Module:
        """Build the module, which follows `Policy`. Called under `torch.device("meta")`: allocate no real memory."""
        raise NotImplementedError(f"{type(self).__name__} must define build()")

    def build_to_count(self) -> nn.Module:
        """The module on which `rlinf plan` counts what a step takes; built on the meta device like `build`.

        A policy whose `build` reads files that do not change the module's size (a tokenizer, say) skips them here.
        """
        return self.build()

    def largest_sample(self, cameras: Sequence[str]) -> Sample | None:
        """A synthetic encoded sample of the maximum length, without draws; None: the length is known only from data.

        `rlinf plan` uses it when the run's data are not available.

        Args:
            cameras: The policy's cameras that the dataset has.
        """
        return None

    def useful_flops(self, batch: Batch) -> float | None:
        """Useful operations of training on a batch: those that any implementation must do, forward and backward.

        Two for each multiply-add of matrix products and attention, over tokens that exist and reach the loss; padding
        and recomputation (activation checkpointing) do not count. A run's MFU is computed from them. None: there is no
        formula, and the operations that the policy executes are counted instead.

        Args:
            batch: From `collate`, still on the CPU: reading it waits for no device.
        """
        return None

    def published_name(self, name: str) -> str:
        """The name of a parameter in published weights. It keys initial values, because it survives refactoring."""
        return name

    def published_parts(self, name: str) -> Mapping[str, int]:
        """The published tensors that a parameter stacks along its first axis, in order: name -> rows; empty: just one.

        Each part has its own initial values, keyed by its name, so that packing does not change them.
        """
        return {}

    def check_files(self) -> None:
        """Raise `UserError` naming every missing file of the policy. Leaves torch unloaded; reads headers at most.

        `rlinf validate` calls it. Override it if `weights` is not a path or the policy needs other files.
        """
        if self.weights not in ("", "random") and not Path(self.weights).expanduser().exists():
            raise UserError(f"policy.weights: there is no file or folder {self.weights}")

    def unchecked_files(self) -> Sequence[str]:
        """What `check_files` could not check, one sentence each; shown by `rlinf validate`."""
        return ()

    def files(self) -> Mapping[str, str]:
        """Files besides the weights that inference needs: config field -> path. Exporting the policy copies them."""
        return {}

    def exported(self) -> PolicyConfig:
        """The config of the exported policy, whose `weights` will name the exported folder.

        A policy whose `save_weights` writes more than weights into the folder clears the fields that point elsewhere,
        so that the folder is self-contained and can be moved.
        """
        return self

    def save_weights(self, tensors: Mapping[str, torch.Tensor], folder: Path) -> None:
        """Write whole tensors, keyed by the module's own names, to a folder that `open_weights` can read."""
        raise NotImplementedError(f"{type(self).__name__} cannot save weights")

    def export(
        self, format: str, tensors: Mapping[str, torch.Tensor], folder: Path, sources: Sequence[TrainedOn]
    ) -> None:
        """Write the policy in another project's format.

        Args:
            format: One of `export_formats`.
            tensors: Whole tensors on the CPU, keyed by the module's own names, in the dtype to write.
            folder: An empty folder.
            sources: The datasets the policy was trained on: one, or several of a mixture. If the format supports only
                one, raise a `UserError` that suggests `--source NAME`.
        """
        raise NotImplementedError(f"{type(self).__name__} must define export() for its export_formats")

    def open_weights(self) -> WeightSource:
        """Open `weights` for reading; raise `UserError` that names every missing, unexpected or misshapen tensor."""
        raise NotImplementedError(f"{type(self).__name__} cannot load weights")


class TrainedOn(NamedTuple):
    """A dataset that a policy was trained on."""

    name: str
    """Name in the mixture; empty if it was the only dataset."""
    data: DatasetConfig
    stats: Stats | None
    """Its normalisation statistics; None for policies that do not normalise."""
