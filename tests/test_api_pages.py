"""The site's API pages list every public name; `mkdocs build --strict` checks that each one exists."""

import re

import pytest
from distributions import ROOT

import rlinf_core
import rlinf_core.testing
import rlinf_core.trainers
import rlinf_plugins_openpi

PAGES = [path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "api").glob("*.md")]
LISTED = {name for page in PAGES for name in re.findall(r"^::: (\S+)$", page, re.MULTILINE)}
DATA = ("sample", "transforms", "rotations", "normalize", "pipeline", "batch_memory")
PLAIN = ("hub", "illustration", "results", "plots.actions", "contract.hookspecs", "contract.policy_options")
MODULES = [*(f"data.{name}" for name in DATA), *PLAIN]


@pytest.mark.parametrize(
    "package", [rlinf_core, rlinf_core.testing, rlinf_core.trainers, rlinf_plugins_openpi], ids=lambda it: it.__name__
)
def test_every_exported_name_is_listed(package):
    described_in_words = {"rlinf_core.hookimpl"}  # It is pluggy's, and has no docstring to render.
    assert {f"{package.__name__}.{name}" for name in package.__all__} - described_in_words <= LISTED


def test_every_public_module_is_listed():
    assert {f"rlinf_core.{name}" for name in MODULES} <= LISTED
