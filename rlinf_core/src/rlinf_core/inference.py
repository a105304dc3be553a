"""Run an exported policy: observations with the dataset's column names and units in, actions in its units out."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from rlinf_core.config.load import load_saved_config
from rlinf_core.contract.continuation import Continuation
from rlinf_core.contract.datasets import DatasetConfig
from rlinf_core.contract.module import Policy
from rlinf_core.contract.policy import PolicyConfig
from rlinf_core.data.coverage import CompareObservation, CompareState, Coverage
from rlinf_core.data.pipeline import Pipeline, build_pipeline, encode_observation
from rlinf_core.data.transforms import Transform
from rlinf_core.errors import UserError
from rlinf_core.export import (
    Choice,
    check_run,
    choose_weights,
    find_checkpoint,
    read_statistics,
    read_weights,
)
from rlinf_core.exported import open_exported
from rlinf_core.lora.apply import published_rows
from rlinf_core.lora.digest import Digest
from rlinf_core.plugins.registry import Plugins, get_plugins
from rlinf_core.real_time import Encoded, continue_actions, encode_continuation
from rlinf_core.sampling import Sampler
from rlinf_core.training.checkpoint.state import read_position
from rlinf_core.training.distributed.processes import to_device
from rlinf_core.training.state.adapters import Original, find_adapters
from rlinf_core.training.state.build import DTYPES, finite_tensor, opened_weights
from rlinf_core.training.state.fsdp import materialize

HERE = str(Path(__file__).parent)
"""Warnings name the first line outside of this package: the robot's."""


class OutsideTraining(UserWarning):
    """An observation is outside of what the policy's training data covered."""


class LoadedPolicy:
    """A policy with its pipeline; `load_policy` returns it."""

    def __init__(
        self,
        config: PolicyConfig,
        data: DatasetConfig,
        pipeline: Pipeline,
        module: Any,
        coverage: Coverage | None = None,
        base: frozenset[str] = frozenset(),
        *,
        steps: int | None = None,
        compiled: bool = False,
    ) -> None:
        self.config, self.data = config, data
        self.module = module
        self.sample = Sampler(config, module, steps=steps, compiled=compiled)
        """Draws action chunks, in as many denoising steps as `load_policy` was asked for."""
        self.base = base
        """Names of the parameters that other adapters may share: those that adapters have not trained."""
        self.coverage = coverage
        """What training saw; None if the folder was exported before that was recorded: nothing is compared."""
        self.pipeline, self._plain = self._comparing(pipeline), pipeline
        self.device = next(module.parameters()).device
        self.dtype = _dtype_of(module)
        """Dtype of matrix products."""
        self._noise = np.random.default_rng()
        self._reported: set[str] = set()

    def _comparing(self, pipeline: Pipeline) -> Pipeline:
        """The pipeline, with comparisons of the observation with training before and after the dataset's transforms."""
        if self.coverage is None:
            return pipeline
        steps: tuple[Transform, ...] = (CompareObservation(self.coverage, self._report), *pipeline.dataset)
        if self.coverage.state:
            steps = (*steps, CompareState(*self.coverage.state, self._report))
        return replace(pipeline, dataset=steps)

    def _report(self, what: str, text: str) -> None:
        """Warn, once for each thing that a warning is about: a robot asks many times a second."""
        if what not in self._reported:
            self._reported.add(what)
            warnings.warn(f"{text} (reported once)", OutsideTraining, skip_file_prefixes=(HERE,))

    def infer(
        self,
        observation: Mapping[str, Any],
        noise: NDArray[np.float32] | None = None,
        *,
        continuing: Continuation | None = None,
    ) -> NDArray[np.floating]:
        """Compute a chunk of actions.

        Args:
            observation: A row in the dataset's format: images uint8 [height, width, 3] RGB and vectors [D] under the
                dataset's column names, and the text `task`. Actions and other columns are ignored.
            noise: [H, A] standard normal, the start of sampling; None: drawn for this call.
            continuing: The actions that the robot executes meanwhile, which the chunk is to continue (real-time
                chunking); None: the chunk depends on the observation alone.

        Returns:
            [H, D] actions in the data's units.

        Raises:
            UserError: The observation lacks columns (the message names them all), its state or task is invalid, the
                policy has not learned to act on it (an empty task, a prompt too long for the state in it), `noise`
                has another shape, or the policy cannot continue these actions.

        Warns:
            OutsideTraining: The observation is outside of what training saw; once for each camera, for the state and
                for the task.
        """
        return self.infer_batch([observation], [noise], [continuing])[0]

    def act(
        self,
        observations: Sequence[Mapping[str, Any]],
        generators: Sequence[np.random.Generator],
        continuing: Sequence[Continuation | None] | None = None,
    ) -> list[NDArray[np.floating]]:
        """Compute chunks of actions for several observations as one batch.

        Args:
            observations: At least one, each as for `infer`.
            generators: Draw the noise of each observation's actions.
            continuing: What each chunk continues, as for `infer`; None: nothing.

        Returns:
            For each, [H, D] actions in the data's units.

        Raises:
            UserError: As `infer`.
        """
        noises = [self.config.draw(generator)["noise"] for generator in generators]
        return self.infer_batch(observations, noises, continuing)

    def infer_batch(
        self,
        observations: Sequence[Mapping[str, Any]],
        noises: Sequence[NDArray[np.float32] | None] | None = None,
        continuing: Sequence[Continuation | None] | None = None,
    ) -> list[NDArray[np.floating]]:
        """Compute a chunk of actions for each of several observations, in one pass of the policy.

        Args:
            observations: As `infer` takes them.
            noises: The noise of each, as `infer` takes it; None: all are drawn.
            continuing: What each chunk continues, as `infer` takes it; None: nothing.

        Returns:
            For each observation [H, D], equal up to rounding to what `infer` returns for the same noise.

        Raises:
            UserError: As `infer`, for any of them.
        """
        samples = [self.encode(one) for one in observations]
        previous = [
            None if one is None else self.encode_continuation(observation, sample, one)
            for observation, sample, one in zip(observations, samples, continuing or [None] * len(samples), strict=True)
        ]
        return self.act_on(samples, noises, previous)

    def act_on(
        self,
        samples: Sequence[Any],
        noises: Sequence[NDArray[np.float32] | None] | None = None,
        previous: Sequence[Encoded | None] | None = None,
        steps: int | None = None,
    ) -> list[NDArray[np.floating]]:
        """`infer_batch` for observations that `encode` has prepared and checked, and actions of `encode_continuation`.

        Observations that continue chunks in different ways, or none, are computed one way after another; all of them
        in this many denoising steps.
        """
        starts = []
        for noise in noises or [None] * len(samples):
            drawn = self.config.draw(self._noise)["noise"]
            starts.append(drawn if noise is None else _checked_noise(noise, drawn.shape))
        previous = previous or [None] * len(samples)
        ways = [one and one.trained for one in previous]
        chunks: dict[int, NDArray[np.floating]] = {}
        for way in dict.fromkeys(ways):
            own = [number for number, its in enumerate(ways) if its == way]
            noise = np.stack([starts[number] for number in own])
            continued = [one for i in own if (one := previous[i])]
            found = self._chunks([samples[i] for i in own], noise, continued, steps)
            chunks |= dict(zip(own, found, strict=True))
        return [self.pipeline.decode(chunks[number], sample) for number, sample in enumerate(samples)]

    def _chunks(
        self, samples: Sequence[Any], starts: NDArray[np.float32], previous: Sequence[Encoded], steps: int | None
    ) -> NDArray[np.floating]:
        """The policy's own actions [B, H, A] for a batch of which all or none continue a chunk."""
        batch = to_device(self.config.collate(list(samples)), self.device)
        noise = torch.from_numpy(starts).to(self.device)
        if previous:
            number = self.sample.steps if steps is None else steps
            actions = continue_actions(self.module, batch, noise, previous, number)
        else:
            actions = self.sample(batch, noise, steps)
        chunks: NDArray[np.floating] = actions.float().cpu().numpy()
        return chunks

    def encode_continuation(self, observation: Mapping[str, Any], sample: Any, continuing: Continuation) -> Encoded:
        """Prepare the actions that a chunk continues; `sample` is what `encode` made of the observation."""
        return encode_continuation(self.config, self.data, self._plain, observation, sample, continuing)

    def encode(self, observation: Mapping[str, Any]) -> Any:
        """Prepare an observation for the policy, and compare it with training; raises and warns as `infer`."""
        sample = encode_observation(self.pipeline, self.data, dict(observation))
        trained = self.coverage.measured if self.coverage else {}
        for what, text in self.config.compare_with_training(sample, trained).items():
            self._report(what, text)
        return sample


def _checked_noise(noise: object, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """The caller's noise as float32; raises `UserError` for another shape, or numbers that are not finite."""
    given = np.asarray(noise)
    if given.shape != shape or given.dtype.kind not in "fiu" or not np.isfinite(given).all():
        raise UserError(
            f"noise is {given.dtype} {list(given.shape)}, but must be finite numbers {list(shape)}: actions in a chunk "
            "x width of the policy's actions, standard normal. Without noise=..., infer draws it"
        )
    return np.ascontiguousarray(given, np.float32)


def load_policy(
    folder: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: Literal["fp32", "bf16"] = "fp32",
    plugins: Plugins | None = None,
    source: str = "",
    base: str | Path | LoadedPolicy = "",
    steps: int | None = None,
    compile: bool = False,
) -> LoadedPolicy:
    """Load a policy that `rlinf export` wrote, or adapters that it wrote with the weights that they belong to.

    An observation that is outside of what its training saw gives one warning, `OutsideTraining`; see
    [running a policy](../training.md#running-a-policy).

    Args:
        folder: The exported folder.
        device: Device to compute on.
        dtype: Dtype of matrix products; parameters that the policy keeps in float32 stay so.
        plugins: Plugins that provide its classes; default: those of the environment.
        source: For a mixture, the dataset whose observations it gets and whose actions it returns.
        base: For adapters, the weights that they belong to, if they are not where the run had them: a folder, file or
            hub id as in `policy.weights`. Or a policy that is loaded already, also one with other adapters: the
            weights are then in memory once, on its device and in its dtype.
        steps: Denoising steps of a chunk; None: as in training. Fewer are faster and less exact; see
            [fewer steps](../serving.md#faster).
        compile: Compile a denoising step when it is first used, which takes a minute or more; the same actions up to
            rounding. Without a C++ compiler (on a CPU) or Triton (on a GPU), one warning and no compilation.

    Raises:
        UserError: The folder is not an exported policy, its files are inconsistent, its weights contain NaN or
            infinity, there is no such device or dtype, or the policy has no steps or cannot be compiled.
    """
    folder, device, dtype = Path(folder), _known_device(device), _known_dtype(dtype)
    shared = base if isinstance(base, LoadedPolicy) else None
    if isinstance(base, LoadedPolicy):
        base = "random"
    opened = open_exported(folder, plugins or get_plugins(), source=source, base=base)
    config, adapters = opened.config, opened.adapters
    module, own = _load_module(config, device, DTYPES[dtype], shared)
    if adapters is not None:
        _check_base(module, config, own, str(adapters["digest"]), folder)
    whole = module.eval()
    return LoadedPolicy(
        config, opened.data, opened.pipeline, whole, opened.coverage, own, steps=steps, compiled=compile
    )


def _load_module(
    config: PolicyConfig, device: torch.device, dtype: torch.dtype, shared: LoadedPolicy | None
) -> tuple[Any, frozenset[str]]:
    """The module with its weights, and the names of the parameters that adapters do not train.

    Args:
        config: The policy's config; its `lora` may name adapters.
        device: Where to load it.
        dtype: Dtype of matrix products.
        shared: A policy whose parameters to use instead of reading and holding them again.
    """
    with torch.device("meta"):
        module: Any = config.build()
        before = Original.of(module)
        if config.lora is not None:
            config.add_lora(module)
    added = find_adapters(before, module, lambda: "the policy")
    whole = {name for name, parameter in module.named_parameters() if parameter.requires_grad} - added.owners.keys()
    own = frozenset(before.parameters if config.lora is None else before.parameters.keys() - whole)
    homes = {}
    if shared is not None:
        homes = _sharing(module, own, shared)
        device = next(shared.module.parameters()).device
    weights = opened_weights(config, only_adapters=shared is not None)
    if shared is None:
        shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
        weights.check(added.without_added(shapes))

    def value(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if name in added.owners:
            return added.initial_value(0, name, shape)
        return finite_tensor(weights, name, config)

    materialize(module, device, value)
    added.rebuild_buffers()
    if shared is not None:
        dtype = shared.dtype
        for (owner, name), parameter in homes.items():
            owner._parameters[name] = parameter
    _compute_in(module, dtype)
    return module, own


def _sharing(module: Any, own: frozenset[str], shared: LoadedPolicy) -> dict[tuple[Any, str], torch.nn.Parameter]:
    """Take the shared parameters out of a module that is still on the meta device: module and name -> parameter."""
    there = dict(shared.module.named_parameters())
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    if other := [n for n in own if n not in shared.base or tuple(there[n].shape) != shapes[n]]:
        raise UserError(
            f"load_policy(base=...): the loaded policy {shared.config.type!r} does not have the weights that these "
            f"adapters belong to: {len(other)} of {len(own)} parameters are missing or differ, e.g. {min(other)}"
        )
    homes = {}
    for name in own:
        path, _, last = name.rpartition(".")
        owner = module.get_submodule(path)
        homes[owner, last] = there[name]
        owner._parameters[last] = None
    return homes


def _check_base(module: Any, config: PolicyConfig, own: frozenset[str], expected: str, folder: Path) -> None:
    """Raise `UserError` if adapters were trained on other weights than those that are loaded."""
    digest, parameters = Digest(), dict(module.named_parameters())
    for published, rows in published_rows(module, config).items():
        if rows.parameter in own:
            part = parameters[rows.parameter][rows.first : rows.first + rows.shape[0]]
            digest.add(published, part)
    if str(digest) != expected:
        raise UserError(
            f"the adapters in {folder} belong to other weights than {config.weights}: name those that their run "
            "started from in load_policy(..., base=...)"
        )


def load_run(
    folder: Path,
    choice: Choice,
    *,
    device: str | torch.device,
    dtype: str,
    plugins: Plugins,
    source: str = "",
    steps: int | None = None,
) -> tuple[LoadedPolicy, Path, list[str]]:
    """Load a policy from a checkpoint of a run, as if it had been exported.

    Args:
        folder: The run's folder, `runs/<name>`.
        choice: Which checkpoint, and which of its weights.
        device: Device to compute on.
        dtype: Dtype of matrix products.
        plugins: Plugins that provide the run's classes.
        source: For a mixture, the dataset whose observations the policy gets.
        steps: Denoising steps of a chunk; None: as in training.

    Returns:
        The policy, its checkpoint, and sentences about what was chosen.

    Raises:
        UserError: There is no such run, checkpoint or source, or something of it is damaged.
    """
    device, known = _known_device(device), _known_dtype(dtype)
    check_run(folder)
    run = load_saved_config(folder, plugins)
    given = run.source(source)
    notes: list[str] = []
    checkpoint = find_checkpoint(folder, run.runner.checkpoints_of(folder), choice, notes.append)
    policy = run.policy.with_data_layout(read_position(checkpoint).data_layout)
    run = run.model_copy(update={"policy": policy})
    choice, which = choose_weights(checkpoint, choice)
    statistics = read_statistics(run, folder, checkpoint, given.statistics)
    tensors, said = read_weights(run, checkpoint, choice, plugins)
    with torch.device("meta"):
        module: Any = policy.build()
    materialize(module, device, lambda name, _: tensors.pop(name))
    _compute_in(module, DTYPES[known])
    pipeline = build_pipeline(given.run.data, policy, statistics[1] if statistics else None)
    loaded = LoadedPolicy(policy, given.run.data, pipeline, module.eval(), steps=steps)
    return loaded, checkpoint, [*notes, *said, which]


def _known_device(device: str | torch.device) -> torch.device:
    """The device, if it is there."""
    try:
        known = torch.device(device)
        torch.empty(0, device=known)
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        count = torch.cuda.device_count()
        there = ["cpu", *(f"cuda:{number}" for number in range(count))]
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"load_policy(device={str(device)!r}): there is no such device here; there is {', '.join(there)} ({reason})"
        ) from error
    return known


def _known_dtype(dtype: object) -> Literal["fp32", "bf16"]:
    """The dtype, if it is one of those that policies compute in."""
    names = {torch.float32: "fp32", torch.bfloat16: "bf16"}
    name = names.get(dtype, dtype) if isinstance(dtype, torch.dtype) else dtype
    if name not in DTYPES:
        raise UserError(
            f"load_policy(dtype={dtype!r}): policies compute in {' or '.join(map(repr, DTYPES))}. (float16 overflows: "
            "its largest number is 65504)"
        )
    return "bf16" if name == "bf16" else "fp32"


def _dtype_of(module: Any) -> torch.dtype:
    """The dtype of compute units."""
    units = (unit for unit in module.shard_units() if unit.dtype == "compute")
    dtypes: Iterator[torch.dtype] = (parameter.dtype for unit in units for parameter in unit.module.parameters())
    return next(dtypes, torch.float32)


def _compute_in(module: Policy, dtype: torch.dtype) -> None:
    """Cast the parameters of compute units, except float32 units within them (contract 3)."""
    units = list(module.shard_units())
    wide = {p for unit in units if unit.dtype == "fp32" for p in unit.module.parameters()}
    for unit in units:
        for parameter in unit.module.parameters() if unit.dtype == "compute" else ():
            if parameter not in wide:
                parameter.data = parameter.data.to(dtype)
