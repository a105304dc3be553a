"""Core's tests, in the order in which they run: what is stored, then the policy on its own data, then the site."""

from __future__ import annotations

from rlinf_core.contract.triage import TriageTest
from rlinf_core.triage.tests.closed_loop import ClosedLoopTest
from rlinf_core.triage.tests.data import DataTest
from rlinf_core.triage.tests.learned import ExecutionTest, LearnedTest, PathsTest
from rlinf_core.triage.tests.server import ServerTest
from rlinf_core.triage.tests.site import ActionTest, CameraTest, PromptTest, StateTest, TimingTest
from rlinf_core.triage.tests.statistics import StatisticsTest
from rlinf_core.triage.tests.weights import WeightsTest

TESTS: tuple[type[TriageTest], ...] = (
    DataTest,
    StatisticsTest,
    WeightsTest,
    PathsTest,
    ServerTest,
    LearnedTest,
    CameraTest,
    StateTest,
    ActionTest,
    TimingTest,
    PromptTest,
    ExecutionTest,
    ClosedLoopTest,
)
"""The tests."""
