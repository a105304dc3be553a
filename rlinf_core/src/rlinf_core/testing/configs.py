"""Rules for every config class: documented, frozen, unknown keys forbidden, unchanged by a TOML round trip."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from types import NoneType
from typing import Any, get_args

from pydantic import BaseModel

from rlinf_core.config.toml import write_toml
from rlinf_core.contract.registered import PLUGINS
from rlinf_core.contract.run import RunConfig
from rlinf_core.plugins.registry import get_plugins
from rlinf_core.testing.findings import Findings


def check_class(findings: Findings, model: type[BaseModel]) -> None:
    """Check the class itself, without an instance."""
    findings.expect(
        bool((model.__dict__.get("__doc__") or "").strip()), "the class has a docstring, which listings show"
    )
    findings.expect(bool(model.model_config.get("frozen")), "the config is frozen (model_config)")
    findings.expect(model.model_config.get("extra") == "forbid", "the config forbids unknown keys (model_config)")
    nullable = [
        name
        for name, info in model.model_fields.items()
        if NoneType in get_args(info.annotation) and not info.is_required() and info.default is not None
    ]
    rule = "no field that accepts None has another default: TOML has no null to set it with"
    findings.expect(not nullable, rule, ", ".join(nullable))


def check_round_trip(findings: Findings, config: BaseModel) -> None:
    """Check that the config is unchanged after it is written as TOML and read back."""

    def again() -> BaseModel:
        table = tomllib.loads(write_toml(config.model_dump(mode="json", exclude_none=True)))
        return type(config).model_validate(table, context={PLUGINS: get_plugins()})

    read = findings.attempt("the config can be written as TOML and read again", again)
    if read is not None:
        findings.expect(read == config, "the config is the same after TOML", f"{read!r} of {config!r}")


def check_run_defaults(findings: Findings, defaults: Any) -> bool:
    """Check that a class's `run_defaults` are a TOML table with the run's sections."""
    if not findings.expect(isinstance(defaults, Mapping), "run_defaults is a table", repr(defaults)):
        return False
    text = findings.attempt("run_defaults can be written as TOML", lambda: write_toml(dict(defaults)))
    unknown = sorted(defaults.keys() - RunConfig.model_fields.keys())
    known = findings.expect(not unknown, "run_defaults sets keys that a run has", ", ".join(unknown))
    return known and text is not None
