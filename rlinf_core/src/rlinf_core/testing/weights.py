"""The part of `check_policy` about files of weights: an exported policy can be loaded again."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from rlinf_core.contract.policy import PolicyConfig
from rlinf_core.testing.findings import Findings


def check_weights(findings: Findings, config: PolicyConfig, parameters: Mapping[str, torch.Tensor]) -> None:
    """Write the parameters as `rlinf export` does, and read them as `load_policy` does."""
    if findings.broken:
        findings.skip("save_weights() and open_weights(): they rely on the rules above")
        return
    tensors = {name: tensor.detach().clone() for name, tensor in parameters.items()}
    with TemporaryDirectory() as made:
        folder = Path(made)
        findings.attempt("save_weights() writes to a folder", lambda: config.save_weights(tensors, folder))
        if not any(folder.iterdir()):
            findings.expect(False, "save_weights() writes to a folder", "no file")
            return
        rule = "open_weights() reads what save_weights() wrote, and checks it against the exported policy's module"
        wrong = findings.attempt(rule, lambda: _differences(_exported(config, folder), tensors))
        findings.expect(not wrong, "every tensor that is saved is read again, equal", ", ".join(wrong or []))


def _exported(config: PolicyConfig, folder: Path) -> PolicyConfig:
    """The config of the exported policy as `load_policy` makes it."""
    there = {"weights": str(folder)}
    for field, path in config.files().items():
        there[field] = str(shutil.copy(path, folder))
    table = config.exported().model_dump(mode="json", exclude_none=True, round_trip=True)
    return type(config).model_validate(table | there)


def _differences(exported: PolicyConfig, tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of the parameters whose tensors in the file differ from those that were saved."""
    with torch.device("meta"):
        module: Any = exported.build()
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    source = exported.open_weights()
    source.check(shapes)
    read = {name: source.tensor(name) for name in shapes}
    # A parameter with another shape depends on the data (`data_layout`), which an exported policy may not.
    return [
        name
        for name, shape in shapes.items()
        if tuple(read[name].shape) != shape
        or (name in tensors and tensors[name].shape == shape and not torch.equal(read[name].float(), tensors[name]))
    ]
