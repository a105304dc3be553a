"""Success rates with intervals: tables, metrics and the lines that people read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rlinf_core.results import Cell, ResultTable, cell_text, wilson_interval
from rlinf_core.rollout.agents import POLICY
from rlinf_core.rollout.config import RolloutSettings
from rlinf_core.rollout.delay import Latency
from rlinf_core.rollout.episodes import Result

ALL = "(all)"
DELAYED = (
    " The policy's actions come {latency.delay} actions late (chunks: {latency.chunks}). Jerk: the mean length of the "
    "second difference of its actions."
)
NAMES = {"idle": "idle action", "random": "random actions", "replay": "blind replay"}


def success_table(settings: RolloutSettings, results: Sequence[Result], latency: Latency | None = None) -> ResultTable:
    """Success rates per task and over all, of the policy and of what luck gives.

    Args:
        settings: How it was played.
        results: Finished episodes of all agents.
        latency: The delay of the policy, whose jerk is then a column.
    """
    tasks = list(dict.fromkeys(one.task for one in results))
    agents = [name for name in dict.fromkeys(one.agent for one in results) if name != POLICY]
    lasting = settings.env.after_success > 0
    columns = ["task", "success", *(["at the end"] if lasting else []), *(NAMES.get(name, name) for name in agents)]
    rewards = any(one.best_reward is not None for one in results)
    columns += [*(["largest reward"] if rewards else []), *(["jerk"] if latency else []), "steps", "episodes"]
    rows = []
    for task in [*tasks, *([ALL] if len(tasks) > 1 else [])]:
        own = [one for one in results if one.agent == POLICY and task in (ALL, one.task)]
        cells: list[Cell] = [task, _rate(one.ever for one in own)]
        cells += [_rate(one.success for one in own)] if lasting else []
        cells += [_rate(o.ever for o in results if o.agent == name and task in (ALL, o.task)) for name in agents]
        found = [one.best_reward for one in own if one.best_reward is not None]
        cells += [sum(found) / len(found) if found else None] if rewards else []
        uneven = [one.jerk for one in own if one.jerk is not None]
        cells += [sum(uneven) / len(uneven) if uneven else None] if latency else []
        rows.append((*cells, round(sum(one.steps for one in own) / len(own), 1) if own else None, len(own)))
    return ResultTable(
        title=f"Success in {settings.env.type}",
        columns=tuple(columns),
        rows=tuple(rows),
        note=_note(settings, results) + (DELAYED.format(latency=latency) if latency else ""),
    )


def metrics_of(results: Sequence[Result]) -> dict[str, float]:
    """The metrics of a run: success over all tasks and per task, and the baselines' over all tasks."""
    found: dict[str, float] = {}
    own = [one for one in results if one.agent == POLICY]
    if own:
        found["success"] = sum(one.ever for one in own) / len(own)
        found["success_at_end"] = sum(one.success for one in own) / len(own)
    for task in dict.fromkeys(one.task for one in own):
        of_task = [one.ever for one in own if one.task == task]
        found[f"success/{task}"] = sum(of_task) / len(of_task)
    for agent in dict.fromkeys(one.agent for one in results if one.agent != POLICY):
        of_agent = [one.ever for one in results if one.agent == agent]
        found[f"success_{agent}"] = sum(of_agent) / len(of_agent)
    return found


def summary(table: ResultTable) -> str:
    """One line: the success over all tasks, beside the baselines."""
    row = dict(zip(table.columns, table.rows[-1], strict=True))
    others = [f"{name} {cell_text(row[name])}" for name in NAMES.values() if row.get(name) is not None]
    text = f"{table.title}: {cell_text(row['success'])} of {row['episodes']} episodes"
    return f"{text}; {', '.join(others)}" if others else text


def _rate(successes: Iterable[bool]) -> Cell:
    found = list(successes)
    return wilson_interval(sum(found), len(found)) if found else None


def _note(settings: RolloutSettings, results: Sequence[Result]) -> str:
    text = "In parentheses: 95 % Wilson intervals."
    if settings.env.after_success:
        text += (
            " Success: solved after any step; at the end: still solved "
            f"{settings.env.after_success} control steps after the first success, or at the end of the episode."
        )
    if failed := sum(bool(one.failure) for one in results):
        text += f" {failed} episodes could not be finished by the environment and count as failed."
    return text
