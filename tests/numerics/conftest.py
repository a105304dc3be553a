"""Fixtures of the golden tests, and the table of distances at the end of a run."""

import os
from pathlib import Path

import pytest
import torch
from golden import AREAS, GOLDEN, Report, cases, name_of

PAGE = "RLINF_NUMERICS_PAGE"
"""Environment variable that names a page to write the table to."""
REPORT = pytest.StashKey[Report]()


def pytest_configure(config):
    config.stash[REPORT] = Report()


def pytest_generate_tests(metafunc):
    for area in AREAS:
        if f"{area}_case" in metafunc.fixturenames:
            metafunc.parametrize(f"{area}_case", cases(area), ids=name_of)


@pytest.fixture
def report(request):
    """`report(case, quantity, distance, tolerance)`: record a distance and hold it to its tolerance."""
    return request.config.stash[REPORT]


@pytest.fixture(autouse=True)
def single_thread():
    """The models are tiny: threads only get in one another's way."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pytest_terminal_summary(terminalreporter, config):
    found = config.stash[REPORT]
    if not found.rows:
        return
    write = terminalreporter.write_line
    terminalreporter.section(f"golden data ({GOLDEN.name})")
    width = [max(len(str(row[column])) for row in found.rows) for column in (0, 1)]
    write(f"{'case':{width[0]}}  {'quantity':{width[1]}}  distance  tolerance")
    for case, quantity, distance, tolerance in sorted(found.rows):
        verdict = "" if distance <= tolerance else "  FAILED"
        write(f"{case:{width[0]}}  {quantity:{width[1]}}  {distance:8.1e}  {tolerance:9.0e}{verdict}")
    for name, reason in sorted(found.unchecked().items()):
        write(f"not checked: {name}: {reason}")
    if page := os.environ.get(PAGE):
        write_page(Path(page), found)
        write(f"{page} is written")


def write_page(page, found):
    """Replace what follows the mark in a page by the table of this run."""
    head, mark, _ = page.read_text().partition("<!-- distances -->\n")
    assert mark, f"{page} has no mark for the table"
    lines = ["| case | quantity | distance | tolerance |", "|---|---|---:|---:|"]
    lines += [
        f"| {case} | {what} | {distance:.1e} | {limit:.0e} |" for case, what, distance, limit in sorted(found.rows)
    ]
    lines += ["", "Not checked:", "", *(f"- {name}: {why}" for name, why in sorted(found.unchecked().items()))]
    page.write_text(head + mark + "\n" + "\n".join(lines) + "\n")
