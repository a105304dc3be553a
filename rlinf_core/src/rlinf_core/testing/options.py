"""The part of `check_policy` about names and signatures: a method that core never calls, or calls with more arguments.

Most methods of `PolicyConfig` have a default, so a misspelled one is no error anywhere: core calls the default.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel

from rlinf_core.contract.policy import PolicyConfig
from rlinf_core.contract.policy_options import OPTIONS
from rlinf_core.testing.findings import Findings

LIKENESS = 0.8
"""Names as close as this are reported: `describes`, `transform`, `normalisation`, but not `describe_images`."""
TOGETHER = (("data_layout", "with_data_layout"), ("export_formats", "export"))
"""Pairs of which one has no effect without the other."""


def check_options(findings: Findings, config: PolicyConfig) -> None:
    """Check that core can call what the policy defines; warn of names that are nearly those that core calls."""
    contract = dict(_contract())
    own = _own_names(type(config))
    for name, default in contract.items():
        if name in own and (wrong := _misfit(getattr(config, name), default)):
            findings.expect(False, f"{name}{_form(default)} is what core uses", wrong)
    findings.checked.append("what the policy defines has the form that core uses")
    for pair in TOGETHER:
        there = [name for name in pair if name in own]
        if len(there) == 1:
            findings.expect(False, f"{pair[0]} and {pair[1]} are both defined, or neither", f"only {there[0]}")
    for name in sorted(own - contract.keys() - type(config).model_fields.keys()):
        nearest = get_close_matches(name, contract, n=1, cutoff=LIKENESS)
        if nearest and nearest[0] not in own:  # Else it is a helper of the method that it resembles.
            findings.warn(f"core does not use {name}; is it meant to be {nearest[0]}?")


def _contract() -> Iterator[tuple[str, Any]]:
    """What `PolicyConfig` declares, in the class itself and in those of its optional methods: name -> default."""
    for part in (PolicyConfig, *OPTIONS):
        for name, item in vars(part).items():
            if not name.startswith(("_", "model_")):
                yield name, item.__func__ if isinstance(item, classmethod) else item


def _own_names(policy: type[PolicyConfig]) -> set[str]:
    """Public names that the policy's classes define, without those of pydantic."""
    classes = policy.__mro__[: policy.__mro__.index(PolicyConfig)]
    return {name for one in classes for name in vars(one) if not name.startswith("_") and not hasattr(BaseModel, name)}


def _misfit(own: Any, default: Any) -> str:
    """Why core cannot use this instead of the default; empty if it can."""
    if callable(own) != callable(default):
        return f"a {'method' if callable(own) else type(own).__name__}"
    if not callable(default):
        return ""
    signature = inspect.signature(own)
    asked = list(inspect.signature(default).parameters.values())[1:]
    by_name = {one.name: None for one in asked if one.kind is one.KEYWORD_ONLY}
    try:
        signature.bind(*(one.name for one in asked if one.name not in by_name), **by_name)
    except TypeError:
        return str(signature.replace(return_annotation=inspect.Signature.empty))
    return ""


def _form(default: Any) -> str:
    """The arguments that core gives to a method, without annotations."""
    if not callable(default):
        return ", a value,"
    asked = list(inspect.signature(default).parameters.values())[1:]
    return f"({', '.join(f'{one.name}=' if one.kind is one.KEYWORD_ONLY else one.name for one in asked)})"
