"""The optional methods of a policy's config, one class for each idea. `PolicyConfig` has them all, with defaults.

A policy defines those that it needs, one by one; nobody inherits from these classes. They are plain classes and no
protocols, because a type checker then compares an optional method with its declaration, `typing.override` finds a
misspelled name, and `super()` works. (Nor can a pydantic model inherit from a protocol: their metaclasses conflict.)
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Self, cast

from rlinf_core.contract.weights.origin import Contradiction, compare_with_export, folder_of
from rlinf_core.data.sample import Batch, Sample
from rlinf_core.errors import UserError
from rlinf_core.illustration import Illustration
from rlinf_core.lora.config import LoraConfig
from rlinf_core.lora.files import check_base, selected
from rlinf_core.lora.selection import describe as describe_selection
from rlinf_core.lora.selection import module_groups

if TYPE_CHECKING:
    import torch
    from torch import nn

    from rlinf_core.contract.datasets import DatasetConfig
    from rlinf_core.contract.module import Policy
    from rlinf_core.data.normalize import Stats


class Described:
    """What users see of the policy and of the data it gets, before they train.

    Wanted by a policy that changes the data in ways that a user cannot guess: prompts that are cut, images that are
    augmented. Without these methods, `rlinf validate` and `rlinf inspect` show what core knows of every policy.
    """

    not_here: ClassVar[Mapping[str, str]] = {}
    """Policy types and dataset formats that users may expect and this policy's plugin does not have -> what to use
    instead. A name may be a shell pattern, such as `pi0_fast*`."""

    def describe(self, samples: Iterable[Sample]) -> Mapping[str, str]:
        """Facts about the data that a user should know before training: short name -> one line of text.

        `rlinf validate` shows them, and so does a run when it starts.

        A text that starts with `warning: ` is shown as a warning: it says what is wrong, with a number and the way
        out.

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


class Measured:
    """What a validation measures besides the loss and, for policies with actions, the error of sampled actions.

    Wanted by a policy whose loss is hard to read, such as a language model's. Without it, only those are reported.
    """

    validation_metrics: ClassVar[Mapping[str, Callable[[Mapping[str, float]], float]]] = {}
    """What a validation reports besides its loss: name -> function of the held-out means of `loss` and of the policy's
    own metrics (`PolicyOutput.metrics`). Reported as `val_<name>`, and as `ema_val_<name>` for EMA weights."""
    larger_is_better: ClassVar[frozenset[str]] = frozenset()
    """The `validation_metrics` of which larger values are better."""


class BoundToData:
    """A module whose layout depends on the run's data, such as an embedding with the rows that the prompts use.

    Define both methods or neither. Without them, the layout follows from the config alone.
    """

    def data_layout(self, prompts: Iterable[str]) -> Mapping[str, Sequence[int]]:
        """What the module's layout takes from a run's data (e.g. embedding rows): descriptive name -> numbers.

        Checkpoints store it, and a run resumes only if its data still give the same layout. Empty: the layout does not
        depend on the data.

        Args:
            prompts: The distinct prompts of all training and held-out rows, read lazily.
        """
        return {}

    def with_data_layout(self, layout: Mapping[str, Sequence[int]]) -> Self:
        """The policy bound to the result of `data_layout`; it encodes the samples, builds the module and saves it."""
        return self


class Begun:
    """What a run decides once, when it begins, and keeps when it continues: today's date in a prompt, for example.

    Wanted by a policy whose samples depend on something besides config and data. Without it, such a run could not be
    continued on another day or machine.
    """

    def begun(self, saved: Mapping[str, Any] | None) -> Self:
        """The policy with such values in its fields; the run's `config.toml` keeps them.

        Called before the data are opened, by `rlinf validate` and by rank 0 of a run for all ranks.

        Args:
            saved: The `[policy]` table of the run's `config.toml`, perhaps of an earlier version; None: the run begins.
        """
        return self


class Counted:
    """What a step takes, for `rlinf plan` and for a run's MFU.

    Wanted by a policy whose samples differ in length, or whose `build` reads files. Without these methods, `rlinf plan`
    needs the data, and operations are counted by executing the module, padding included.
    """

    if TYPE_CHECKING:
        build: Callable[[], Policy]

    def build_to_count(self) -> Policy:
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


class Sampled:
    """How a policy draws its actions when it acts.

    Wanted by a policy that draws them in denoising steps. Without these methods, `rlinf serve` refuses `--num-steps`
    and `--compile`.
    """

    def sampling_steps(self) -> int:
        """Denoising steps of a chunk, whose number may change: `sample_actions` takes `num_steps`. 0: it does not."""
        return 0

    def compile_sampling(self, policy: nn.Module, *, on: bool) -> bool:
        """Let `sample_actions` compute with `torch.compile` from its next call on, or as written again.

        It may then see few shapes: each batch size may be compiled once, but no length of a prompt.

        Returns:
            Whether the policy can be compiled.
        """
        return False


class Compared:
    """What a policy compares of an observation with its training data, before it acts on it.

    Wanted by a policy that can lose a part of an observation, as one that cuts long prompts. Without it,
    `LoadedPolicy.infer` compares what core knows: empty tasks, sizes of images and the range of states.
    """

    def measured(self, sample: Sample) -> Mapping[str, float]:
        """Numbers of an encoded sample whose range in training an exported policy knows: what is measured -> number.

        Args:
            sample: An encoded row without images.
        """
        return {}

    def compare_with_training(self, sample: Sample, trained: Mapping[str, tuple[float, float]]) -> Mapping[str, str]:
        """What of an encoded observation is outside of training: a short name -> a warning, given once, with numbers.

        Args:
            sample: The encoded observation.
            trained: The smallest and the largest of each `measured` number in training; empty if they are not known.

        Raises:
            UserError: The policy would act without something that it has learned to use.
        """
        return {}


class Published:
    """The names that parameters have in published weights.

    Wanted by a policy whose module has other names than the files it reads, or packs several tensors into one. Without
    it, parameters are published under the module's own names, and renaming one in the code changes its initial value.
    """

    def published_name(self, name: str) -> str:
        """The name of a parameter in published weights. It keys initial values, because it survives refactoring."""
        return name

    def published_parts(self, name: str) -> Mapping[str, int]:
        """The published tensors that a parameter stacks along its first axis, in order: name -> rows; empty: just one.

        Each part has its own initial values, keyed by its name, so that packing does not change them.
        """
        return {}


class Checked:
    """What `rlinf validate` checks of the policy's files.

    Wanted if `weights` may be an id on a hub, or the policy needs other files. Without it, `weights` must be a path.
    """

    if TYPE_CHECKING:
        weights: str
        normalization: ClassVar[Literal["mean_std", "quantile", "none"]]

    def check_files(self) -> None:
        """Raise `UserError` naming every missing file of the policy. Leaves torch unloaded; reads headers at most.

        `rlinf validate` calls it. Override it if `weights` is not a path or the policy needs other files.
        """
        if self.weights not in ("", "random") and not Path(self.weights).expanduser().exists():
            raise UserError(f"policy.weights: there is no file or folder {self.weights}")

    def local_files(self) -> Mapping[str, Sequence[Path]]:
        """The files on this machine that training reads: setting -> files, those of a hub id in the local cache.

        A run on several machines compares them (besides those of `files`), and refuses different ones. Called after
        `open_weights`; it lists files and loads no torch. Default: the file that `weights` names, or in a folder
        `model.safetensors`, or all files directly in it.
        """
        path = Path(self.weights).expanduser()
        if self.weights in ("", "random") or not path.exists():
            return {}
        single = path if path.is_file() else path / "model.safetensors"
        files = [single] if single.is_file() else sorted(one for one in path.iterdir() if one.is_file())
        return {"policy.weights": files}

    def contradictions(self, data: DatasetConfig, stats: Stats | None) -> Sequence[Contradiction]:
        """What the files beside `weights` say that contradicts the run; a run reports it with its statistics.

        Default: the files that `rlinf export` wrote. Override it if weights come with files of other projects, or if
        they depend on keys of `[policy]`: see `contract.weights.origin`. Leaves torch unloaded.

        Args:
            data: The run's dataset; of a mixture, each in turn.
            stats: Its statistics; None if the policy does not normalise.
        """
        folder = folder_of(self.weights) if self.weights not in ("", "random") else None
        mode = self.normalization
        return compare_with_export(folder, self, data, stats, mode, ()) if folder else ()

    def unchecked_files(self) -> Sequence[str]:
        """What `check_files` could not check, one sentence each; shown by `rlinf validate`."""
        return ()


class Exported:
    """What `rlinf export` writes besides the weights, and the other projects' formats that it can write.

    Wanted by a policy that needs files to act (a tokenizer), or that other projects can load. Without it, an exported
    folder has weights, statistics and config, which suffices for `load_policy` and for `policy.weights`.
    """

    export_formats: ClassVar[tuple[str, ...]] = ()
    """Other projects' layouts that `export` writes."""

    def files(self) -> Mapping[str, str]:
        """Files besides the weights that inference needs: config field -> path. Exporting the policy copies them."""
        return {}

    def exported(self) -> Self:
        """The config of the exported policy, whose `weights` will name the exported folder.

        A policy whose `save_weights` writes more than weights into the folder clears the fields that point elsewhere,
        so that the folder is self-contained and can be moved.
        """
        return self

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

    def card(self, format: str, sources: Sequence[TrainedOn]) -> CardNotes:
        """What the model card of an exported folder says that only the policy knows: see `CardNotes`.

        Args:
            format: `rlinf`, or one of `export_formats`.
            sources: The datasets the policy was trained on, as `export` gets them.
        """
        return CardNotes()


class Adapted:
    """Low-rank adapters (LoRA), by the table `[policy.lora]`: which layers get them if the table does not say.

    Every policy has them in its linear layers without these methods. Wanted by a policy whose parts should have names
    in the table.
    """

    if TYPE_CHECKING:
        lora: LoraConfig | None
        weights: str

    lora_targets: ClassVar[tuple[str, ...]] = ("attention", "mlp")
    """The layers with adapters if `lora.targets` does not say, by the expressions that it takes."""
    lora_modules: ClassVar[tuple[str, ...]] = ()
    """What is trained whole beside them if `lora.modules_to_save` does not say."""

    @classmethod
    def lora_run_defaults(cls, table: Mapping[str, Any]) -> Mapping[str, Any]:
        """Run defaults that hold with adapters instead of those in `run_defaults`, as a TOML table.

        Args:
            table: `[policy.lora]` as it was written, not validated yet.
        """
        return {}

    def lora_groups(self, name: str) -> Collection[str]:
        """The groups that `lora.targets` may name and a published module belongs to, e.g. `attention`.

        Args:
            name: The module's name in published weights, without `.weight`.
        """
        return module_groups(name)

    def lora_shapes(self) -> Mapping[str, tuple[int, ...]] | None:
        """All published parameters that the loss depends on -> shapes, for `rlinf validate`; None: not known yet.

        Leaves torch unloaded.
        """
        return None

    def lora_matrices(self, shapes: Mapping[str, tuple[int, ...]]) -> Collection[str]:
        """Which published modules are linear layers that can have adapters, by the shapes of all parameters.

        Layers that no loss reaches can have some only with `lora.weights`.
        """
        return [
            name.removesuffix(".weight")
            for name, shape in shapes.items()
            if len(shape) == 2 and name.endswith(".weight") and module_groups(name)
        ]

    def describe_lora(self) -> str:
        """What `[policy.lora]` trains, in numbers; empty if the parameters are not known yet.

        Raises:
            UserError: An expression of the table matches nothing, or the adapters in `lora.weights` do not fit.
        """
        check_base(self.lora, self.weights)
        if self.lora is None or (shapes := self.lora_shapes()) is None:
            return ""
        selection = selected(self.lora, self, self.lora_matrices(shapes), shapes)
        return describe_selection(self.lora, selection, shapes)

    def add_lora(self, policy: nn.Module) -> None:
        """Freeze the module and add the adapters of `[policy.lora]`; it is on the meta device."""
        from rlinf_core.lora.apply import add_lora

        assert self.lora is not None
        add_lora(policy, cast("Any", self), self.lora)


class Continued:
    """Chunks that continue the one that the robot executes while they are computed: real-time chunking.

    Wanted by a policy that is slower than a control step. Without it, robots jump from one chunk to the next.
    """

    def continuation_ways(self) -> Mapping[str, int]:
        """How the module's `continue_actions` can continue a chunk -> the longest delay, in actions.

        `guided`: without training for it; `trained`: with the actions given that are executed meanwhile. Empty: it has
        no such method. See `contract.module.ContinuingPolicy`.
        """
        return {}


class TrainedOn(NamedTuple):
    """A dataset that a policy was trained on."""

    name: str
    """Name in the mixture; empty if it was the only dataset."""
    data: DatasetConfig
    stats: Stats | None
    """Its normalisation statistics; None for policies that do not normalise."""


class CardNotes(NamedTuple):
    """A policy's part of the model card in an exported folder; empty values leave it to core."""

    title: str = ""
    """The model's name for people, such as `π0.5`."""
    library: str = ""
    """The hub's `library_name`: the project that loads the folder; empty: `rlinf`."""
    pipeline_tag: str = ""
    """The hub's `pipeline_tag`; empty: `robotics` for a policy with actions."""
    tags: tuple[str, ...] = ()
    """Tags besides those of core."""
    use: str = ""
    """How to run the folder, as Markdown; `FOLDER` stands for it. Empty: `load_policy` and `rlinf serve`, for a policy
    with actions."""
    limits: tuple[str, ...] = ()
    """What someone who runs the policy must know, one sentence each, as Markdown."""


OPTIONS = (
    Described,
    Measured,
    BoundToData,
    Begun,
    Counted,
    Sampled,
    Compared,
    Published,
    Checked,
    Exported,
    Adapted,
    Continued,
)
"""All of them, in the order of the page docs/contract.md."""
