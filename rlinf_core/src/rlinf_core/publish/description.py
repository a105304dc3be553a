"""The description and the digests of an exported folder: `rlinf.json`, or `SHA256SUMS` in other projects' layouts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from rlinf_core.contract.run import RunConfig
from rlinf_core.contract.weights.origin import DESCRIPTION
from rlinf_core.files import write_text

DIGESTS = "SHA256SUMS"
"""Digests of all files in a folder for another project's loader; `sha256sum --check` reads it, too."""
DIGESTS_KEY = "sha256"
"""Key of the digests in the description."""


def write_description(run: RunConfig, output: Path, facts: Mapping[str, Any]) -> None:
    """Write `rlinf.json`: policy and data, `facts`, versions and the digests of all files that are there.

    Args:
        run: The run, for the chosen dataset.
        output: The exported folder.
        facts: What else the description says; keys keep their order, after `format`.
    """
    config = run.model_dump(mode="json", exclude_none=True, round_trip=True)
    exported = run.policy.exported().model_copy(update={"lora": None})
    policy = exported.model_dump(mode="json", exclude_none=True, round_trip=True)
    versions = {d.name: d.version for d in metadata.distributions() if d.name.startswith(("rlinf", "torch"))}
    description = {
        **facts,
        "policy": policy,
        "data": config["data"],
        "versions": dict(sorted(versions.items())),
        DIGESTS_KEY: digests_of(output),
    }
    (output / DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n")


def write_digests(output: Path) -> None:
    """Write `SHA256SUMS` for all files that are there."""
    lines = [f"{digest}  {name}\n" for name, digest in digests_of(output).items()]
    write_text(output / DIGESTS, "".join(lines))


def digests_of(folder: Path) -> dict[str, str]:
    """SHA-256 of every file in a folder by its name in it, in order."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): sha256_of(path) for path in files}


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
