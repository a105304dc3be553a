"""Core's tests, in the order in which they run: what is stored, then the policy on its own data, then the site."""

from __future__ import annotations

from rlinf_core.contract.triage import TriageTest
from rlinf_core.triage.learned import ExecutionTest, LearnedTest, PathsTest
from rlinf_core.triage.simulated import ClosedLoopTest
from rlinf_core.triage.site import ActionTest, CameraTest, PromptTest, StateTest, TimingTest
from rlinf_core.triage.stored import DataTest, StatisticsTest, WeightsTest

TESTS: tuple[type[TriageTest], ...] = (
    DataTest,
    StatisticsTest,
    WeightsTest,
    PathsTest,
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
