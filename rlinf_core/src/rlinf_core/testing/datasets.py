"""`check_dataset`: check that a dataset's config follows the rules that the data pipeline relies on."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from rlinf_core.config.toml import merge
from rlinf_core.contract.datasets import ColumnSource, DatasetConfig, LeRobotDatasetConfig, SampleSource
from rlinf_core.contract.policy import PolicyConfig
from rlinf_core.data.lerobot.files import find_root
from rlinf_core.data.lerobot.metadata import load_metadata
from rlinf_core.data.normalize import Normalize
from rlinf_core.data.pipeline import Pipeline
from rlinf_core.data.sample import Row, Sample
from rlinf_core.data.statistics.compute import compute_norm_stats, outputs, takes_batches
from rlinf_core.data.transforms import Transform
from rlinf_core.errors import UserError
from rlinf_core.plugins.registry import Plugins, get_plugins
from rlinf_core.testing.configs import check_class, check_round_trip, check_run_defaults
from rlinf_core.testing.findings import Findings, Report
from rlinf_core.testing.samples import check_form, same

TOLERANCE = 1e-5
"""Allowed error of decoded actions, relative to the largest value in states and actions: float32 rounding."""


def check_dataset(
    config: DatasetConfig | type[DatasetConfig],
    *,
    rows: int = 64,
    policy: PolicyConfig | None = None,
    plugins: Plugins | None = None,
) -> Report:
    """Check that a dataset's config conforms. Opens rows if they are on this machine.

    Args:
        config: A config whose `repo_id` is a local folder, or a class, to check with its defaults.
        rows: Number of training rows to check, evenly spread.
        policy: The policy whose transforms are appended; default: the one in `run_defaults`, if it is complete.
        plugins: Source of policies and readers; default: the plugins of the environment.

    Returns:
        What was checked, and what was not checked and why; `print` shows it.

    Raises:
        AssertionError: A rule is broken; the message has one line per finding.
    """
    model = config if isinstance(config, type) else type(config)
    findings = Findings(model.__qualname__)
    plugins = plugins or get_plugins()
    check_class(findings, model)
    dataset = findings.attempt("the defaults make a config", model) if isinstance(config, type) else config
    if dataset is None:
        findings.skip("everything else: no config could be created")
        return findings.report()
    check_round_trip(findings, dataset)
    own, asks_for = _own_policy(findings, model, plugins)
    if own and asks_for and not policy:
        findings.skip(f"the policy's own transforms (pass policy=): {asks_for}")
    policy, complete = (policy, True) if policy else (own, not asks_for)
    if policy is None:
        findings.skip("rows: no policy is known, which sets the number of actions in a row (pass policy=)")
    elif not dataset.repo_id or not Path(dataset.repo_id).expanduser().exists():
        findings.skip(f"rows: repo_id = {dataset.repo_id!r} is not on this machine (pass a config that names a folder)")
    else:
        _check_rows(findings, dataset, policy, plugins, rows, policy_transforms=complete)
    return findings.report()


def _own_policy(findings: Findings, model: type[DatasetConfig], plugins: Plugins) -> tuple[PolicyConfig | None, str]:
    """The policy that `run_defaults` names, and what the user still has to set, such as weights."""
    if not check_run_defaults(findings, model.run_defaults):
        return None, ""
    table = model.run_defaults.get("policy", {})
    name = table.get("type")
    if name is None:
        findings.skip("the policy: run_defaults does not name one")
        return None, ""
    cls = findings.attempt(f"run_defaults' policy.type {name!r} is registered", lambda: plugins.policy(name))
    if cls is None:
        return None, ""
    table = merge(cls.run_defaults.get("policy", {}), table)
    wrong: list[str] = []
    try:
        return cls.model_validate(table), ""
    except ValidationError as error:
        # A mistake at a key is the dataset's; one of the whole table asks for a setting that only the user knows.
        wrong = [f"policy.{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors() if one["loc"]]
        asks_for = "; ".join(one["msg"].removeprefix("Value error, ") for one in error.errors())
    except UserError as error:
        asks_for = str(error)
    if not findings.expect(not wrong, "run_defaults' policy table is valid", ", ".join(wrong)):
        return None, ""
    return cls.model_construct(**table), asks_for


def _check_rows(
    findings: Findings,
    dataset: DatasetConfig,
    policy: PolicyConfig,
    plugins: Plugins,
    count: int,
    *,
    policy_transforms: bool,
) -> None:
    if isinstance(dataset, LeRobotDatasetConfig) and not _check_columns(findings, dataset, policy):
        findings.skip("rows: columns are missing")
        return
    whole = findings.attempt("training rows open", partial(_open, dataset, policy, plugins))
    if whole is None:
        return
    indices = np.unique(np.linspace(0, len(whole) - 1, min(count, len(whole))).astype(np.int64))
    source = _Subset(whole, indices.tolist())
    read = findings.attempt("rows can be read", lambda: source.__getitems__(range(len(source))))
    steps = findings.attempt(
        "repack() and transforms() can be called", lambda: (dataset.repack(), *dataset.transforms())
    )
    if read is None or steps is None:
        return
    repack, *transforms = steps
    _check_batches(findings, whole, source, steps)
    normalize = None
    if policy.normalization != "none":
        rule = "statistics can be computed, without images unless stats_need_images is set"
        stats = findings.attempt(rule, lambda: compute_norm_stats(source, steps, read_images=dataset.stats_need_images))
        normalize = None if stats is None else Normalize(stats, policy.normalization)
    after = findings.attempt("the policy's transforms", policy.transforms) or () if policy_transforms else ()
    pipeline = Pipeline(repack, tuple(transforms), normalize, tuple(after))
    _check_inference(findings, pipeline, read[0])
    _check_encoding(findings, pipeline, source, read, policy)


def _open(dataset: DatasetConfig, policy: PolicyConfig, plugins: Plugins) -> SampleSource:
    source: SampleSource | None = plugins.hook.rlinf_open_dataset(dataset=dataset, policy=policy, split="train")
    if source is None:
        raise UserError("no plugin opens it: derive from LeRobotDatasetConfig, or implement rlinf_open_dataset")
    return source


def _check_columns(findings: Findings, dataset: LeRobotDatasetConfig, policy: PolicyConfig) -> bool:
    """Whether every column of the config is in the dataset; each missing one is a finding."""
    metadata = findings.attempt(
        "the folder holds a LeRobot dataset", lambda: load_metadata(dataset.repo_id, find_root(dataset.repo_id, ""))
    )
    if metadata is None:
        return False
    keys = {f"data.images.{camera}": [column] for camera, column in dataset.images.items()}
    keys |= {"data.state": list(dataset.state), "data.actions": list(dataset.actions if policy.chunk_length() else ())}
    before = len(findings.broken)
    for key, columns in keys.items():
        for column in columns:
            findings.attempt(f"{key} names columns of the dataset", partial(metadata.feature, column, key))
    return len(findings.broken) == before


def _check_batches(findings: Findings, whole: SampleSource, source: _Subset, steps: Sequence[Transform]) -> None:
    """Check transforms marked `batched`, to which statistics pass many rows at once."""
    if not isinstance(whole, ColumnSource) or not all(map(takes_batches, steps)):
        return
    rule = "`batched` transforms give the same values for many rows at once as for each row alone"
    both = findings.attempt(
        rule, lambda: (outputs(source, steps, range(len(source))), outputs(whole, steps, source.indices))
    )
    if both is not None:
        one_by_one, at_once = both
        findings.expect(
            all(key in at_once and np.array_equal(at_once[key], one_by_one[key]) for key in one_by_one), rule
        )


def _check_inference(findings: Findings, pipeline: Pipeline, row: Row) -> None:
    """Check transforms without actions, as at inference; statistics already run them without images."""

    def encode() -> Any:
        sample: Any = {k: v for k, v in pipeline.repack(copy.deepcopy(row)).items() if not k.startswith("actions")}
        for transform in pipeline.dataset:
            sample = transform(sample)
        return sample

    findings.attempt("transforms take a sample without actions (inference)", encode)


def _check_encoding(
    findings: Findings, pipeline: Pipeline, source: _Subset, rows: Sequence[Row], policy: PolicyConfig
) -> None:
    untouched = copy.deepcopy(rows[0])
    encoded = findings.attempt("rows pass repack and transforms", lambda: [pipeline.encode(row) for row in rows])
    if encoded is None:
        return
    findings.expect(same(rows[0], untouched), "repack and transforms change no array in place")
    check_form(findings, pipeline.target(rows[0]), policy.chunk_length())
    again = findings.expect(
        same(pipeline.encode(source.__getitems__([0])[0]), encoded[0]), "one row is the same each time"
    )
    copied = findings.attempt(
        "rows and transforms can be pickled (they are sent to workers)",
        lambda: pickle.loads(pickle.dumps((source.whole, pipeline))),
    )
    if again and copied is not None:
        elsewhere = copied[1].encode(_Subset(copied[0], source.indices).__getitems__([0])[0])
        findings.expect(same(elsewhere, encoded[0]), "a row is the same after pickling")
    if "actions" in encoded[0]:
        _check_decoding(findings, pipeline, rows, encoded)


def _check_decoding(findings: Findings, pipeline: Pipeline, rows: Sequence[Row], encoded: Sequence[Sample]) -> None:
    """Check that `decode(encode(row))` is the row's own chunk, so that the robot executes the recorded actions."""
    targets = [pipeline.target(row) for row in rows]
    decoded = findings.attempt(
        "inverses run on encoded actions", lambda: [pipeline.decode(one["actions"], one) for one in encoded]
    )
    if decoded is None:
        return
    shapes = decoded[0].shape, targets[0]["actions"].shape
    rule = "decoded actions have the data's shape (remove the policy's padding in the dataset's transforms)"
    if not findings.expect(shapes[0] == shapes[1], rule, f"{shapes[0]}, the data's is {shapes[1]}"):
        return
    numbers = [np.abs(np.asarray(one[key])).max() for one in targets for key in ("actions", "state") if key in one]  # type: ignore[literal-required]
    errors = np.abs(np.stack(decoded) - np.stack([one["actions"] for one in targets])).max(axis=(0, 1))
    worst = int(errors.argmax())
    rule = f"inverses restore actions to within {TOLERANCE:g} of the largest value"
    found = f"dimension {worst} of the action off by {errors[worst]:.3g}, the largest value is {max(numbers):.3g}"
    findings.expect(bool(errors[worst] <= TOLERANCE * max(numbers)), rule, found)


@dataclass(frozen=True)
class _Subset:
    """A subset of a source's rows."""

    whole: SampleSource
    indices: Sequence[int]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitems__(self, indices: Sequence[int]) -> list[Row]:
        return self.whole.__getitems__([self.indices[i] for i in indices])

    def without_images(self, indices: Sequence[int]) -> list[Row]:
        return self.whole.without_images([self.indices[i] for i in indices])

    @property
    def episodes(self) -> Any:
        return self.whole.episodes[list(self.indices)]

    def describe(self, index: int) -> str:
        return self.whole.describe(self.indices[index])

    def fingerprint(self) -> str:
        return self.whole.fingerprint()
