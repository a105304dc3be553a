"""Samples for checks: their required form, equality, and a synthetic sample."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlinf_core.contract.policy import PolicyConfig
from rlinf_core.data.normalize import Normalize, NormStats
from rlinf_core.data.pipeline import Pipeline
from rlinf_core.data.sample import Sample
from rlinf_core.data.transforms import Transform
from rlinf_core.testing.findings import Findings

WIDTH = 7
"""Dimensions of the synthetic state and action: an arm with six joints and a gripper."""


def same(one: Any, other: Any) -> bool:
    """Whether two values are equal to the bit: nested mappings, sequences, arrays and plain values."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, np.ndarray) or isinstance(other, np.ndarray):
        one, other = np.asarray(one), np.asarray(other)
        floating = np.issubdtype(one.dtype, np.floating)
        return one.dtype == other.dtype and np.array_equal(one, other, equal_nan=bool(floating))
    return bool(one == other)


def check_form(findings: Findings, sample: Mapping[str, Any], chunk_length: int) -> None:
    """Check the keys of a sample against `data.sample.Sample`."""
    for name, image in sample.get("images", {}).items():
        good = isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[-1] == 3
        findings.expect(good, f"images.{name} is uint8 [height, width, 3]", _form(image))
    if "state" in sample:
        findings.expect(_is_floating(sample["state"], 1), "state is floating, [D]", _form(sample["state"]))
    if chunk_length and findings.expect("actions" in sample, "the sample has actions, because the policy does"):
        actions, pad = sample["actions"], sample.get("actions_is_pad")
        good = _is_floating(actions, 2) and len(actions) == chunk_length
        findings.expect(good, f"actions are floating, [H, D] with H = {chunk_length}", _form(actions))
        good = isinstance(pad, np.ndarray) and pad.dtype == np.bool_ and pad.shape == (chunk_length,)
        findings.expect(good, f"actions_is_pad is bool [H] with H = {chunk_length}", _form(pad))
    if "prompt" in sample:
        findings.expect(isinstance(sample["prompt"], str), "prompt is a str", _form(sample["prompt"]))


def synthetic(policy: PolicyConfig) -> Sample:
    """A sample of an arm without cameras, as after a dataset's transforms."""
    generator = np.random.default_rng(0)
    sample = Sample(images={}, state=generator.standard_normal(WIDTH, np.float32), prompt="lift the red block")
    if horizon := policy.chunk_length():
        sample["actions"] = generator.standard_normal((horizon, WIDTH), np.float32)
        sample["actions_is_pad"] = np.zeros(horizon, np.bool_)
    return sample


def described(sample: Mapping[str, Any], above: str = "") -> list[str]:
    """A line per value: name, dtype, shape and range of an array, anything else in full."""
    lines: list[str] = []
    for name, value in sample.items():
        if isinstance(value, Mapping) and value:
            lines += described(value, f"{above}{name}.")
        elif isinstance(value, np.ndarray):
            numbers = f" from {value.min():.3g} to {value.max():.3g}" if value.size and value.dtype != np.bool_ else ""
            lines.append(f"{above}{name}: {value.dtype} {list(value.shape)}{numbers}")
        else:
            lines.append(f"{above}{name}: {value!r}")
    return lines


def variants(sample: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Three variants of a sample: other values, and in the last a chunk that runs past its episode's end."""
    found: list[dict[str, Any]] = []
    for scale in (1.0, 0.5, -0.75):
        keys = {key: np.float32(scale) * np.asarray(sample[key]) for key in ("state", "actions") if key in sample}
        found.append({**sample, **keys})
    if "actions_is_pad" in sample:
        horizon = len(sample["actions_is_pad"])
        found[-1]["actions_is_pad"] = np.arange(horizon) >= max(1, horizon - 1)
    return found


def pipeline_of(policy: PolicyConfig, sample: Mapping[str, Any]) -> Pipeline:
    """Normalisation by the sample's own range, then the policy's transforms."""
    if policy.normalization == "none":
        return Pipeline(_Identity(), (), None, tuple(policy.transforms()))
    stats: dict[str, NormStats] = {}
    for key in ("state", "actions"):
        if key in sample:
            numbers = np.asarray(sample[key], np.float64).reshape(-1, np.shape(sample[key])[-1])
            reach = np.abs(numbers).max(axis=0) + 1e-3
            stats[key] = NormStats(mean=np.zeros_like(reach), std=reach, q01=-reach, q99=reach)
    return Pipeline(_Identity(), (), Normalize(stats, policy.normalization), tuple(policy.transforms()))


@dataclass(frozen=True)
class _Identity(Transform):
    def __call__(self, sample: Sample) -> Sample:
        return sample


def _is_floating(value: Any, axes: int) -> bool:
    return isinstance(value, np.ndarray) and np.issubdtype(value.dtype, np.floating) and value.ndim == axes


def _form(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else type(value).__name__
