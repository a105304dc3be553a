"""A pytest plugin: the table of distances at the end of a run, however many processes made it.

A test's distances travel with its report, as other processes send theirs; the whole table is where pytest reports.
"""

import os
from pathlib import Path

import pytest
from golden import GOLDEN, unchecked

PAGE = "RLINF_NUMERICS_PAGE"
"""Environment variable that names a page to write the table to."""
DISTANCE = "distance"
"""Key of a test's user properties: case, quantity, distance, tolerance."""
FOUND = pytest.StashKey[list[tuple[str, str, float, float]]]()


def pytest_configure(config):
    config.stash[FOUND] = []
    config.pluginmanager.register(Collector(config.stash[FOUND]), "distances of reports")


@pytest.fixture
def report(request):
    """`report(case, quantity, distance, tolerance)`: record a distance and hold it to its tolerance."""

    def report(case, quantity, distance, tolerance):
        request.node.user_properties.append((DISTANCE, (case, quantity, float(distance), tolerance)))
        assert distance <= tolerance, f"{case}: {quantity} is off by {distance:.2e}, allowed {tolerance:.0e}"

    return report


class Collector:
    """Takes the distances out of reports, this process's own or other processes'."""

    def __init__(self, found):
        self.found = found

    def pytest_runtest_logreport(self, report):
        if report.when == "teardown":  # The last of a test, which has all it recorded.
            self.found += [tuple(value) for key, value in report.user_properties if key == DISTANCE]


def pytest_terminal_summary(terminalreporter, config):
    rows = sorted(config.stash[FOUND])
    if not rows:
        return
    write = terminalreporter.write_line
    terminalreporter.section(f"golden data ({GOLDEN.name})")
    width = [max(len(str(row[column])) for row in rows) for column in (0, 1)]
    write(f"{'case':{width[0]}}  {'quantity':{width[1]}}  distance  tolerance")
    for case, quantity, distance, tolerance in rows:
        verdict = "" if distance <= tolerance else "  FAILED"
        write(f"{case:{width[0]}}  {quantity:{width[1]}}  {distance:8.1e}  {tolerance:9.0e}{verdict}")
    missing = sorted(unchecked(rows).items())
    for name, reason in missing:
        write(f"not checked: {name}: {reason}")
    if page := os.environ.get(PAGE):
        write_page(Path(page), rows, missing)
        write(f"{page} is written")


def write_page(page, rows, missing):
    """Replace what follows the mark in a page by the table of this run."""
    head, mark, _ = page.read_text().partition("<!-- distances -->\n")
    assert mark, f"{page} has no mark for the table"
    lines = ["| case | quantity | distance | tolerance |", "|---|---|---:|---:|"]
    lines += [f"| {case} | {what} | {distance:.1e} | {limit:.0e} |" for case, what, distance, limit in rows]
    lines += ["", "Not checked:", "", *(f"- {name}: {why}" for name, why in missing)]
    page.write_text(head + mark + "\n" + "\n".join(lines) + "\n")
