"""`check_policy`: check that a policy's config and the module it builds follow the rules that trainers rely on."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np

from rlinf_core.contract.policy import PolicyConfig
from rlinf_core.data.sample import Sample
from rlinf_core.plugins.registrations import type_of
from rlinf_core.testing.configs import check_class, check_round_trip, check_run_defaults
from rlinf_core.testing.findings import Findings, Report
from rlinf_core.testing.options import check_options
from rlinf_core.testing.samples import described, pipeline_of, same, synthetic, variants


def check_policy(config: PolicyConfig, sample: Sample | None = None) -> Report:
    """Check that a policy conforms: its config, its transforms, and the module on the CPU in float32.

    Use a small variant: every parameter is initialised and trained for one step.

    Args:
        config: The policy.
        sample: A sample after the dataset's transforms, before normalisation; default: a synthetic one of an arm with
            7-dimensional state and actions, a prompt, and no cameras. Pass one if the policy needs something else.

    Returns:
        What was checked, and what was not checked and why; `print` shows it.

    Raises:
        AssertionError: A rule is broken; the message has one line per finding.
    """
    findings = Findings(type(config).__qualname__)
    check_class(findings, type(config))
    findings.attempt("`type` is a Literal with one name", lambda: type_of(type(config), PolicyConfig))
    check_round_trip(findings, config)
    check_run_defaults(findings, type(config).run_defaults)
    findings.attempt("the config can be pickled (it is sent to workers)", lambda: pickle.loads(pickle.dumps(config)))
    check_options(findings, config)
    _check_draw(findings, config)
    before = len(findings.broken)
    rule = "data_layout(prompts) and with_data_layout(layout) can be called"
    bound = findings.attempt(rule, lambda: _with_layout(config, sample))
    config = bound or config
    samples = _encode(findings, config, sample)
    if samples is None:
        findings.skip("collate and the module: no samples could be encoded")
    else:
        _check_module(findings, config, samples)
    if len(findings.broken) > before:
        findings.sample = _introduce(config, sample)
    return findings.report()


def _check_module(findings: Findings, config: PolicyConfig, samples: list[Sample]) -> None:
    from rlinf_core.testing.modules import check_collate, check_module

    if check_collate(findings, config, samples):
        check_module(findings, config, samples)
    else:
        findings.skip("the module: no batch could be collated")


def _introduce(config: PolicyConfig, sample: Sample | None) -> str:
    """The sample that a policy failed on, key by key."""
    if sample is None:
        head = "check_policy made this sample; if the policy needs another, pass it: check_policy(config, sample)"
    else:
        head = "the sample that was given"
    return "\n".join([f"{head}:", *(f"  {line}" for line in described(sample or synthetic(config)))])


def _with_layout(config: PolicyConfig, sample: Sample | None) -> PolicyConfig:
    given: Any = sample or synthetic(config)
    return config.with_data_layout(config.data_layout([given["prompt"]] if "prompt" in given else []))


def _generator(key: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=key))


def _check_draw(findings: Findings, config: PolicyConfig) -> None:
    drawn = findings.attempt("draw(generator) can be called", lambda: [config.draw(_generator(1)) for _ in range(2)])
    if drawn is None:
        return
    findings.expect(same(drawn[0], drawn[1]), "draw() is a function of its generator alone (contract 1)")
    if horizon := config.chunk_length():
        noise = drawn[0].get("noise")
        good = isinstance(noise, np.ndarray) and noise.dtype == np.float32 and noise.ndim == 2 and len(noise) == horizon
        found = f"{noise.dtype} {list(noise.shape)}" if isinstance(noise, np.ndarray) else type(noise).__name__
        findings.expect(good, f"draw() gives `noise`, float32 [H, A] with H = {horizon}", found)


def _encode(findings: Findings, config: PolicyConfig, sample: Sample | None) -> list[Sample] | None:
    """Three encoded samples with their draws, as `collate` gets them."""
    given: Any = sample or synthetic(config)
    rule = "transforms take a sample" + ("" if sample else " (a synthetic one; pass check_policy a sample that fits)")
    encoded = findings.attempt(rule, lambda: [pipeline_of(config, given).encode(one) for one in variants(given)])
    if encoded is None:
        return None
    pipeline = pipeline_of(config, given)
    copied: Any = findings.attempt(
        "transforms can be pickled (they are sent to workers)", lambda: pickle.loads(pickle.dumps(pipeline))
    )
    again = findings.expect(same(pipeline.encode(variants(given)[0]), encoded[0]), "transforms do the same each time")
    if again and copied is not None:
        findings.expect(same(copied.encode(variants(given)[0]), encoded[0]), "transforms do the same after pickling")
    observation: Any = {key: value for key, value in given.items() if not key.startswith("actions")}
    findings.attempt("transforms take a sample without actions (inference)", lambda: pipeline.encode(observation))
    without = {key: value for key, value in given.items() if key != "images"}
    findings.attempt("transforms take a sample without images (statistics)", lambda: pipeline.encode(without))
    facts = findings.attempt("describe() takes samples", lambda: config.describe(pipeline.encode(w) for w in [without]))
    if facts is not None:
        texts = all(isinstance(text, str) for fact in facts.items() for text in fact)
        findings.expect(texts, "describe() maps names of facts to lines of text", facts)
    drawn = [_draw(config, key) for key in range(len(encoded))]
    return [{**one, **draw} for one, draw in zip(encoded, drawn, strict=True)]  # type: ignore[typeddict-item]


def _draw(config: PolicyConfig, key: int) -> dict[str, Any]:
    try:
        return config.draw(_generator(key))
    except Exception:  # Already reported by `_check_draw`.
        return {}
