"""Export a run's checkpoint to a folder with everything that a policy needs to act.

The folder contains the weights in the layout that the policy's `open_weights` reads, `norm_stats.json` (for a mixture
`norm_stats/<source>.json`), copies of the policy's files (a tokenizer), and `rlinf.json`, which describes how to encode
observations and lists the files' hashes. `inference.load_policy` reads it; `policy.weights` may name it. Every folder
has a model card, `README.md`.
"""

from __future__ import annotations

import shutil
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from rlinf_core.config.load import load_saved_config
from rlinf_core.config.toml import read_toml
from rlinf_core.contract.policy import TrainedOn
from rlinf_core.contract.run import RunConfig, RunSource
from rlinf_core.contract.weights.origin import STATISTICS
from rlinf_core.data.coverage import FILE as COVERAGE
from rlinf_core.data.coverage import parse_coverage
from rlinf_core.data.normalize import Stats
from rlinf_core.data.statistics.run import trained_statistics
from rlinf_core.errors import UserError, did_you_mean
from rlinf_core.files import check_writable, writing
from rlinf_core.loggers.jsonl import METRICS_FILE, read_metrics
from rlinf_core.lora.apply import published_rows
from rlinf_core.lora.digest import Digest
from rlinf_core.lora.files import write_adapters
from rlinf_core.lora.layers import LowRank, LowRankAdapter
from rlinf_core.plugins.registry import Plugins
from rlinf_core.publish.card import write_card
from rlinf_core.publish.description import sha256_of, write_description, write_digests
from rlinf_core.publish.exported import NATIVE, Exported
from rlinf_core.publish.measured import measured_of
from rlinf_core.torch_names import read_shards
from rlinf_core.training.checkpoint.load import layout_difference
from rlinf_core.training.checkpoint.shards import ShardReader
from rlinf_core.training.checkpoint.state import (
    NAMES,
    candidates,
    find_damage,
    newest_whole,
    none_whole,
    read_position,
    statistics_copy,
    step_name,
)
from rlinf_core.training.state.adapters import Merge
from rlinf_core.training.state.build import DTYPES, build_on_meta
from rlinf_core.training.state.fsdp import layout
from rlinf_core.untrusted.text import read_json

FORMAT = 1
NUMBERS_AT_A_TIME = 2**28
SIMULATOR = "simulator"
"""The evaluator whose environment an exported folder remembers, and its key in the description."""
ADAPTERS = "adapters"
"""Key of the description of adapters that were exported alone."""
NAME_OUTPUT = "Name another folder with --output"


@dataclass(frozen=True)
class Choice:
    """What to export from a run."""

    step: int | None = None
    """The checkpoint after this step; None: the newest."""
    best: bool = False
    """The checkpoint with the best validation metric."""
    ema: bool | None = None
    """The moving average (EMA) of the weights, or the weights as trained (live). None: of the best checkpoint those
    with the better validation, otherwise live."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Dtype of the exported weights."""
    format: str = NATIVE
    """Format of the result: `NATIVE` or one of the policy's."""
    source: str = ""
    """For a mixture, the dataset to export for; empty: all, of which `load_policy` chooses one."""
    adapters: Literal["", "merge", "alone"] = ""
    """Adapters that the run has trained: merged into the weights, or written alone, in PEFT's layout. Empty: merged, if
    there are any."""
    results: tuple[Path, ...] = ()
    """Files that `rlinf eval --output` wrote, for the model card."""
    licence: str = ""
    """The licence of the exported policy, by the hub's id, for the model card; empty: unknown."""


def export_run(
    folder: Path, output: Path, choice: Choice, plugins: Plugins, log: Callable[[str], object] = print
) -> Path:
    """Export a run's policy; on failure, nothing is written.

    Args:
        folder: The run's folder, `runs/<name>`.
        output: The folder to create.
        choice: Which weights to export, and how.
        plugins: Plugins that provide the run's classes.
        log: Called with a warning for each damaged checkpoint that was skipped, which weights were chosen and whether
            the run has others, and what became of adapters.

    Returns:
        The checkpoint that was exported.

    Raises:
        UserError: There is no such run or checkpoint, an adapter cannot be merged, or the output already exists or
            cannot be written.
    """
    check_run(folder)
    run = load_saved_config(folder, plugins)
    sources = (run.source(choice.source),) if choice.source else run.sources
    _check_choice(run, choice, output)
    checkpoint = find_checkpoint(folder, run.runner.checkpoints_of(folder), choice, log)
    policy = run.policy.with_data_layout(read_position(checkpoint).data_layout)
    run = run.model_copy(update={"policy": policy})
    choice, which = choose_weights(checkpoint, choice)
    found = {s.statistics: read_statistics(run, folder, checkpoint, s.statistics) for s in sources}
    exported = _exported(run, folder, checkpoint, choice, sources, found)
    alone = choice.adapters == "alone"
    adapters = read_adapters(run, checkpoint, choice, plugins) if alone else None
    tensors, notes = ({}, [str(adapters)]) if adapters else read_weights(run, checkpoint, choice, plugins)
    if choice.adapters == "merge" and not notes:
        raise UserError(f"{folder} has no adapters to merge: leave out --merge")
    for note in (*notes, which, *_left_out(run, choice)):
        log(note)
    with _whole_or_absent(output) as aside:
        if choice.format != NATIVE:
            run.policy.export(choice.format, tensors, aside, exported.sources)
            write_digests(aside)
        else:
            if adapters:
                adapters.write(aside, base_of(run), choice.dtype)
            else:
                run.policy.save_weights(tensors, aside)
            _describe(exported, {file: one[0] for file, one in found.items() if one}, aside, choice, adapters)
        write_card(aside, exported)
    return checkpoint


@contextmanager
def _whole_or_absent(output: Path) -> Iterator[Path]:
    """A temporary folder to write to, which becomes `output` unless writing fails."""
    aside = output.with_name(f".{output.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with writing(output, NAME_OUTPUT):
            aside.mkdir(parents=True)
            yield aside
            if output.exists():
                output.rmdir()
            aside.rename(output)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _check_choice(run: RunConfig, choice: Choice, output: Path) -> None:
    """Raise `UserError` if the policy has no such format, adapters cannot be written, or the output is not free."""
    formats = (NATIVE, *run.policy.export_formats)
    if choice.format not in formats:
        raise UserError(
            f"the policy {run.policy.type!r} has no export format {choice.format!r}"
            f"{did_you_mean(choice.format, formats)} (available: {', '.join(formats)})"
        )
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        inside = f" and contains {min(output.iterdir()).name}" if output.is_dir() else ""
        raise UserError(f"{output} already exists{inside}: name another --output, or remove it")
    check_writable(output, NAME_OUTPUT)
    _check_adapters(run, choice)


def _exported(
    run: RunConfig,
    folder: Path,
    checkpoint: Path,
    choice: Choice,
    sources: Sequence[RunSource],
    statistics: Mapping[str, tuple[Path, Stats] | None],
) -> Exported:
    """What the folder will hold. Raises `UserError` if a file of results is of other weights."""
    position, ema = read_position(checkpoint), bool(choice.ema)
    validation = validated(folder, run, position.step)["metrics"]
    found = {source.name: statistics[source.statistics] for source in sources}
    return Exported(
        run=run,
        folder=folder,
        sources=[TrainedOn(s.name, s.run.data, one and one[1]) for s, one in zip(sources, found.values(), strict=True)],
        digests={name: sha256_of(one[0]) for name, one in found.items() if one},
        format=choice.format,
        step=position.step,
        rows=position.rows,
        ema=ema,
        dtype=choice.dtype,
        adapters=choice.adapters == "alone",
        measured=measured_of(folder, position.step, ema, validation, choice.results),
        licence=choice.licence,
    )


def check_run(folder: Path) -> None:
    """Raise `UserError` unless the folder is that of a run, `runs/<name>`."""
    if (folder / "config.toml").is_file():
        return
    if not folder.exists():
        what = f"there is no {folder} (in {Path.cwd()})"
    elif not folder.is_dir():
        what = f"{folder} is a file"
    elif ((run := folder.resolve().parent.parent) / "config.toml").is_file():
        what = f"{folder} is part of the run in {run} (--step selects a checkpoint)"
    else:
        what = f"{folder} is not a run: it has no config.toml"
    raise UserError(f"{what}: name the run's folder, runs/<name>")


def read_statistics(run: RunConfig, folder: Path, checkpoint: Path, file: str) -> tuple[Path, Stats] | None:
    """The statistics that a checkpoint was trained with, and a file that holds them; None if it does not normalise.

    Raises:
        UserError: They are missing or damaged, or the run's file is not equal to the checkpoint's copy.
    """
    if run.policy.normalization == "none":
        return None
    recorded = statistics_copy(checkpoint, file)
    stats, _ = trained_statistics(folder / file, recorded)
    return recorded or folder / file, stats


def find_checkpoint(folder: Path, checkpoints: Path, choice: Choice, log: Callable[[str], object]) -> Path:
    """The folder of the chosen checkpoint, whose files match their hashes; by default the newest undamaged one.

    Args:
        folder: The run's folder.
        checkpoints: The folder of its checkpoints.
        choice: Which checkpoint.
        log: Called with a warning for each damaged checkpoint that was skipped.

    Raises:
        UserError: There is no such checkpoint (the message lists those that exist), or it is damaged.
    """
    if choice.best:
        if not (folder / "best").exists():
            raise UserError(f"{folder} has no best checkpoint: runner.save_best was not set")
        name = (folder / "best").read_text().strip()
    elif choice.step is not None:
        name = step_name(choice.step)
    else:
        return _newest(folder, checkpoints, log)
    there = sorted(path.name for path in checkpoints.glob(NAMES))
    if name not in there:
        steps = ", ".join(str(int(name.removeprefix("step_"))) for name in there) or "none"
        raise UserError(f"{folder} has no checkpoint of step {int(name.removeprefix('step_'))} (available: {steps})")
    if why := find_damage(checkpoints / name, ranks=1):
        raise UserError(f"{checkpoints / name} is damaged: {why}. Choose another one with --step")
    return checkpoints / name


def _newest(folder: Path, checkpoints: Path, log: Callable[[str], object]) -> Path:
    damaged: dict[str, str] = {}
    paths = candidates(folder, checkpoints)
    while newest := newest_whole(paths, damaged):
        path, _ = newest
        if why := find_damage(path, ranks=1):
            damaged[path.name] = why
            continue
        for name, why in damaged.items():
            log(f"warning: the checkpoint {name} is damaged: {why}; exporting {path.name} instead")
        return path
    if damaged:
        raise none_whole(checkpoints, damaged, "Restore one, or name an undamaged one with --step.")
    raise UserError(f"{folder} has no checkpoint")


EMA = "ema_"
"""Prefix of the validation results of the moving average."""


def choose_weights(checkpoint: Path, choice: Choice) -> tuple[Choice, str]:
    """Decide between live weights and their moving average.

    Args:
        checkpoint: The folder of the checkpoint.
        choice: What to export; its `ema` may be undecided.

    Returns:
        The choice with `ema` decided, and a sentence that says which weights it is and whether there are others.

    Raises:
        UserError: The moving average is asked for, and the checkpoint has none.
    """
    best = read_position(checkpoint).best
    has_ema = any(name.startswith("ema.") for name in ShardReader(checkpoint).read_metadata().state_dict_metadata)
    ema = (choice.best and best.metric.startswith(EMA)) if choice.ema is None else choice.ema
    if ema and not has_ema:
        raise UserError(f"{checkpoint} has no moving average of the weights: optim.ema_decay was 0")
    said = "weights: the moving average (EMA)" if ema else "weights: live"
    if choice.best and best.value is not None and best.metric:
        won = "chosen by" if ema == best.metric.startswith(EMA) else "not those that were chosen by"
        said += f", {won} {best.metric} = {best.value:.4g} at step {best.step}"
    if has_ema and ema:
        said += "; --no-ema exports the live weights"
    elif has_ema:
        said += "; the run also keeps a moving average (EMA), which --ema exports"
    return replace(choice, ema=ema), said


def read_weights(
    run: RunConfig, checkpoint: Path, choice: Choice, plugins: Plugins
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Full tensors of a checkpoint by the policy's own parameter names, on the CPU, in the chosen dtype.

    Adapters are merged in float32. Besides the result, about a gigabyte of float32 is in memory at a time.

    Returns:
        The tensors, and what became of adapters, one sentence each.
    """
    policy, adapters = build_on_meta(run, plugins)
    read = _reader(policy, checkpoint, choice)
    merge = Merge(policy, adapters)
    tensors: dict[str, torch.Tensor] = {}
    for part in _parts(merge.groups()):
        there = read({name: shape for _, shapes in part for name, shape in shapes.items()})
        for adapter, group in part:
            merged = merge(adapter, {name: there[name] for name in group})
            tensors |= {name: tensor.to(DTYPES[choice.dtype]) for name, tensor in merged.items()}
    order = [name for name, _ in policy.named_parameters() if name in tensors]
    return {name: tensors[name] for name in order}, merge.notes()


def _reader(
    policy: Any, checkpoint: Path, choice: Choice
) -> Callable[[Mapping[str, torch.Size]], dict[str, torch.Tensor]]:
    """A function that reads a checkpoint's parameters by name and shape: whole, float32, live or averaged as chosen.

    Raises:
        UserError: The checkpoint is of a model with another layout.
    """
    position, reader = read_position(checkpoint), ShardReader(checkpoint)
    if (tag := layout(policy.named_parameters())) != position.layout:
        shapes = {f"model.{name}": tuple(parameter.shape) for name, parameter in policy.named_parameters()}
        raise UserError(
            f"{checkpoint} was saved by a model with another layout ({position.layout}; this one has {tag}): "
            f"{layout_difference(reader, position, shapes)}. Restore what differs."
        )
    saved_names = reader.read_metadata().state_dict_metadata

    def read(names: Mapping[str, torch.Size]) -> dict[str, torch.Tensor]:
        # Frozen parameters have no separate average.
        keys = {
            name: f"ema.{name}" if choice.ema and f"ema.{name}" in saved_names else f"model.{name}" for name in names
        }
        found = {keys[name]: torch.empty(shape, dtype=torch.float32) for name, shape in names.items()}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # Intended here.
            read_shards(found, storage_reader=reader, no_dist=True)
        return {name: found[key] for name, key in keys.items()}

    return read


Group = tuple[str, dict[str, torch.Size]]
"""What `Merge.groups` gives."""


def _parts(groups: Iterable[Group]) -> Iterator[list[Group]]:
    """Groups of parameters, in parts of about a gigabyte of float32."""
    part: list[Group] = []
    for group in groups:
        part.append(group)
        if sum(shape.numel() for _, shapes in part for shape in shapes.values()) >= NUMBERS_AT_A_TIME:
            yield part
            part = []
    if part:
        yield part


def _left_out(run: RunConfig, choice: Choice) -> Iterator[str]:
    """What the policy was trained for and the format does not have."""
    if choice.format != NATIVE and "trained" in run.policy.continuation_ways():
        yield (
            f"the policy was trained for real-time chunking, which the format {choice.format!r} does not have: its "
            "loaders run it without giving it the actions that are executed meanwhile"
        )


def _check_adapters(run: RunConfig, choice: Choice) -> None:
    """Raise `UserError` if adapters cannot be written alone."""
    if choice.adapters != "alone":
        return
    if choice.format != NATIVE:
        raise UserError(
            f"--adapters writes PEFT's layout, not the format {choice.format!r}: leave out --adapters or --format"
        )
    if run.policy.weights in ("", "random"):
        raise UserError(
            "adapters alone need the weights that they belong to, and this run started from its initial values: "
            "export them merged, without --adapters"
        )


def base_of(run: RunConfig) -> str:
    """The weights that a run's adapters belong to; a path is absolute."""
    path = Path(run.policy.weights).expanduser()
    return str(path.resolve()) if path.exists() else run.policy.weights


@dataclass(frozen=True)
class TrainedAdapters:
    """What a run with adapters has trained."""

    changes: Mapping[str, LowRank]
    """Published module -> the change of its weight."""
    whole: Mapping[str, torch.Tensor]
    """Published parameter -> its trained value."""
    digest: str
    """Digest of the frozen weights, see `lora.digest`."""
    base_dtype: Literal["bf16", "fp32"]
    """How they were held."""

    def __str__(self) -> str:
        numbers = sum(one.a.numel() + one.b.numel() for one in self.changes.values())
        beside = f", and {len(self.whole)} parameters that were trained whole" * bool(self.whole)
        return (
            f"adapters of {len(self.changes)} matrices ({numbers:,} numbers{beside}), without the weights they change"
        )

    def write(self, folder: Path, base: str, dtype: str) -> None:
        """Write them in PEFT's layout."""
        write_adapters(folder, self.changes, self.whole, base=base, dtype=dtype)


def read_adapters(run: RunConfig, checkpoint: Path, choice: Choice, plugins: Plugins) -> TrainedAdapters:
    """What a run with adapters has trained, in float32.

    Raises:
        UserError: The run has no adapters, or some that PEFT's layout cannot express.
    """
    policy, adapters = build_on_meta(run, plugins)
    read = _reader(policy, checkpoint, choice)
    others = [name for name, module in adapters.modules.items() if not isinstance(module, LowRankAdapter)]
    if not adapters.modules or others:
        found = f"{others[0]} ({adapters.classes[others[0]]}) is another kind" if others else "the run has none"
        raise UserError(f"--adapters writes low-rank adapters, and {found}: export without --adapters")
    changes: dict[str, LowRank] = {}
    for owner, module in adapters.modules.items():
        names = [name for name, its in adapters.owners.items() if its == owner]
        tensors = read({name: policy.get_parameter(name).shape for name in names})
        changes |= module.low_rank({name.removeprefix(f"{owner}."): tensors[name] for name in names})
    whole: dict[str, torch.Tensor] = {}
    digest = Digest()
    rows = {
        name: one for name, one in published_rows(policy, run.policy).items() if one.parameter not in adapters.owners
    }
    last, tensor = "", torch.empty(0)
    for published, place in rows.items():
        parameter = policy.get_parameter(place.parameter)
        if place.parameter != last:
            last, tensor = place.parameter, read({place.parameter: parameter.shape})[place.parameter]
        part = tensor[place.first : place.first + place.shape[0]]
        if parameter.requires_grad:
            whole[published] = part.clone()
        else:
            digest.add(published, part)
    dtypes = {parameter.dtype for parameter in policy.parameters()}
    return TrainedAdapters(changes, whole, str(digest), "bf16" if torch.bfloat16 in dtypes else "fp32")


def _describe(
    exported: Exported, trained_on: Mapping[str, Path], output: Path, choice: Choice, adapters: TrainedAdapters | None
) -> None:
    """Write everything but the weights: statistics, the policy's files, and the description."""
    whole = run = exported.run
    if choice.source:
        source = run.source(choice.source)
        run, statistics = source.run, {source.statistics: STATISTICS}
    else:
        statistics = {source.statistics: source.statistics for source in run.sources}
    for there, here in statistics.items():
        if there in trained_on:
            (output / here).parent.mkdir(exist_ok=True)
            shutil.copyfile(trained_on[there], output / here)
    files = {field: Path(path).name for field, path in run.policy.files().items()}
    for field, path in run.policy.files().items():
        shutil.copyfile(path, output / files[field])
    belonging: dict[str, Any] = {}
    if adapters:
        belonging[ADAPTERS] = {"base": base_of(run), "digest": adapters.digest, "base_dtype": adapters.base_dtype}
    facts = {
        "format": FORMAT,
        "run": run.runner.name,
        "step": exported.step,
        "weights": "ema" if choice.ema else "live",
        "dtype": choice.dtype,
        "files": files,
        "coverage": _coverage(exported.folder, choice.source),
        "validation": validated(exported.folder, whole, exported.step),
        **belonging,
        **_simulator(exported.folder),
    }
    write_description(run, output, facts)


def _simulator(folder: Path) -> dict[str, Any]:
    """The simulator in which a run was evaluated, so that `rlinf eval --env` plays by the same settings."""
    saved = read_toml(folder / "config.toml")
    settings = saved.get("evaluators", {}).get(SIMULATOR)
    if settings is None or SIMULATOR not in saved["runner"].get("evaluators", ()):
        return {}
    return {SIMULATOR: {key: settings[key] for key in ("env", "tasks") if key in settings}}


def _coverage(folder: Path, source: str) -> dict[str, Any]:
    """What the run's training saw, of each dataset or of the chosen one; empty if the run did not record it."""
    path = folder / COVERAGE
    if not path.exists():
        return {}
    try:
        tables = read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): remove it to export a policy without limits") from error
    names = [source] if source else list(tables) if isinstance(tables, dict) else []
    found = {name: parse_coverage({name: tables.get(name)}, name, str(path)) for name in names}
    return {name: one.model_dump(mode="json") for name, one in found.items() if one is not None}


def validated(folder: Path, run: RunConfig, step: int) -> dict[str, Any]:
    """What a run's validation measured at a checkpoint, with which `rlinf triage` compares an exported policy.

    Args:
        folder: The run's folder.
        run: The run.
        step: Finished steps.

    Returns:
        `metrics`, and the `seed` and number of `samples` with which they were measured.
    """
    path = folder / METRICS_FILE
    metrics: dict[str, float] = {}
    for row in read_metrics(path):
        if row["step"] == step and "loss" not in row:
            metrics |= {name: value for name, value in row.items() if name != "step" and value is not None}
    return {"seed": run.seed, "samples": run.runner.val_samples, "metrics": metrics}
