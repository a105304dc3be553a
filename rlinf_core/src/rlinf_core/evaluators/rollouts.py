"""Let a sharded policy act in a simulator, while it trains.

The ranks on rank 0's machine have environments, and divide the episodes. A sharded policy computes on all ranks or
none, so that ranks on other machines, and those whose episodes have ended, compute along with a filler observation.
All ranks wait for an evaluation and for nothing else: its processes start and end with it.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlinf_core.contract.evaluation import Evaluation, EvaluationData
from rlinf_core.contract.process_group import ProcessGroup
from rlinf_core.contract.run import RunConfig
from rlinf_core.errors import UserError
from rlinf_core.evaluators.simulator import SimulatorConfig
from rlinf_core.files import write_text
from rlinf_core.results import FOLDER, TABLE
from rlinf_core.rollout.agents import POLICY, Agent, PolicyAgent, build_baselines, demonstrations_of, seconds_per_action
from rlinf_core.rollout.episodes import FILE, Result, in_order, plan_episodes, read_episodes, to_lines
from rlinf_core.rollout.play import answer
from rlinf_core.rollout.pool import Asking, Pool
from rlinf_core.rollout.tables import metrics_of, success_table, summary

SECONDS_A_LOOK = 5.0
"""How long a rank waits for an environment before all ranks ask whether the run is to stop."""
BASELINES = "baselines.jsonl"


class Rollouts:
    """Plays the episodes of the run's simulator on every evaluation; baselines once per start of the run."""

    def __init__(self, config: SimulatorConfig, run: RunConfig, data: EvaluationData, group: ProcessGroup) -> None:
        self._config, self._run, self._group = config, run, group
        self._source = next(one for one in data.sources if one.name == (config.source or one.name))
        self._tasks = config.chosen_tasks()
        hosts = group.gather(socket.gethostname())
        playing = [rank for rank, host in enumerate(hosts) if host == hosts[0]]
        self._share = playing.index(group.rank) if group.rank in playing else None
        self._players = len(playing)
        self._filler: Mapping[str, Any] | None = None
        self._luck: list[Result] | None = None
        self._warnings: list[str] = []
        self._folder = tempfile.TemporaryDirectory(prefix="rollouts-")

    def evaluate(self, policy: Any, *, step: int, interrupted: Callable[[], bool]) -> Evaluation | None:
        """Play all episodes; every rank calls it."""
        if self._luck is None:
            self._luck = self._baselines(interrupted)
            if self._luck is None:
                return None
        began = time.monotonic()
        agent = PolicyAgent(
            lambda seen, generators: self._source.act(policy, seen, generators), self._config.env.replan
        )
        own = self._play({POLICY: agent}, interrupted)
        if own is None:
            return None
        planned = plan_episodes([POLICY], self._tasks, self._config.episodes, self._config.seed)
        results = [*in_order(itertools.chain.from_iterable(self._group.gather(own)), planned), *self._luck]
        table = success_table(self._config, results)
        files: dict[str, bytes | Path] = {one.video: Path(self._folder.name) / one.video for one in own if one.video}
        if self._group.rank == 0:
            lines = to_lines(self._config.identity(), results)
            files |= {f"success{TABLE}": table.to_json(), FILE: lines.encode()}
        warnings, self._warnings = [f"warning: {text}" for text in self._warnings], []
        return Evaluation(
            metrics_of(results), files, [*warnings, f"{summary(table)}, {time.monotonic() - began:.0f} s"]
        )

    def close(self) -> None:
        """Remove the videos that were not copied into the run's folder."""
        self._folder.cleanup()

    def _play(self, agents: Mapping[str, Agent], interrupted: Callable[[], bool]) -> list[Result] | None:
        """Play this rank's share of the agents' episodes, in step with the other ranks; None if interrupted."""
        config, own = self._config, list[Result]()
        episodes = plan_episodes(agents, self._tasks, config.episodes, config.seed)
        share = [] if self._share is None else episodes[self._share :: self._players]
        folder = Path(self._folder.name)
        with Pool(
            config,
            share,
            looks=lambda name: agents[name].looks,
            folder=folder,
            finished=own.append,
            step_seconds=seconds_per_action(self._source.rows),
            warn=self._warnings.append,
        ) as pool:
            while not interrupted():
                asking, error = _look(pool)
                states = self._group.gather((bool(asking), pool.unfinished, error))
                if failed := [text for _, _, text in states if text]:
                    raise UserError(failed[0])
                if not any(unfinished for _, unfinished, _ in states):
                    return own
                if POLICY not in agents:
                    answer(pool, asking, agents)
                elif any(asks for asks, _, _ in states):
                    self._act(pool, asking, agents)
        return None

    def _act(self, pool: Pool, asking: Sequence[Asking], agents: Mapping[str, Agent]) -> None:
        """Compute a batch of actions, on all ranks; one without an episode that asks computes along."""
        if self._filler is None:
            first = asking[0].observation if asking else None
            self._filler = next(one for one in self._group.gather(first) if one is not None)
        if asking:
            answer(pool, asking, agents)
        else:
            agent = agents[POLICY]
            assert isinstance(agent, PolicyAgent)
            agent.act([self._filler], [np.random.default_rng(0)])

    def _baselines(self, interrupted: Callable[[], bool]) -> list[Result] | None:
        """The baselines' episodes, which the run's folder keeps: they do not depend on its weights."""
        source, prompts = self._source, [task.prompt for task in self._tasks]
        wanted = self._config.baselines
        found = demonstrations_of(source.rows, source.pipeline, prompts) if "replay" in wanted else {}
        agents = build_baselines(wanted, self._config.env, found)
        path = self._run.folder / FOLDER / self._config.type / BASELINES
        known = self._group.decide(lambda: _known(path, self._config.identity()))
        planned = plan_episodes(agents, self._tasks, self._config.episodes, self._config.seed)
        keys = {one.key for one in planned}
        if keys <= {one.key for one in known}:
            return [one for one in known if one.key in keys]
        own = self._play(agents, interrupted)
        if own is None:
            return None
        results = in_order(itertools.chain.from_iterable(self._group.gather(own)), planned)
        if self._group.rank == 0:
            with contextlib.suppress(OSError):  # They are played again when the run continues.
                path.parent.mkdir(parents=True, exist_ok=True)
                write_text(path, to_lines(self._config.identity(), results))
        return results


def _look(pool: Pool) -> tuple[list[Asking], str]:
    """The episodes that ask, and the error of one that failed, which all ranks must raise."""
    try:
        return pool.asking(SECONDS_A_LOOK), ""
    except UserError as error:
        return [], str(error)


def _known(path: Path, identity: Mapping[str, Any]) -> list[Result]:
    """The episodes in a file; none if there is no such file, or it is of other settings."""
    try:
        return read_episodes(path, identity) if path.exists() else []
    except (OSError, UserError):
        return []
