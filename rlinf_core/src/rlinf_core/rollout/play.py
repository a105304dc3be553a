"""Play episodes: agents, processes and the episodes file together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rlinf_core.rollout.agents import Agent
from rlinf_core.rollout.config import RolloutSettings
from rlinf_core.rollout.episodes import Episode, Result
from rlinf_core.rollout.pool import Asking, Pool


def play(
    settings: RolloutSettings,
    episodes: Sequence[Episode],
    agents: Mapping[str, Agent],
    *,
    folder: Path | None = None,
    finished: Callable[[Result], object] = lambda result: None,
    step_seconds: float = 0.0,
    warn: Callable[[str], object] = lambda text: None,
) -> None:
    """Play episodes to their end, in this process and those of the environment.

    Args:
        settings: The environment and how to play.
        episodes: What to play.
        agents: Who acts, by the name in `Episode.agent`.
        folder: Where to keep videos; None: nowhere.
        finished: Called with each result, which is final.
        step_seconds: Seconds between the actions of a chunk in the training data; 0: unknown.
        warn: Called with what makes a success rate mean little.

    Raises:
        UserError: The environment failed, or the policy's actions do not fit it; finished episodes have been reported.
    """
    with Pool(
        settings,
        episodes,
        looks=lambda name: agents[name].looks,
        folder=folder,
        finished=finished,
        step_seconds=step_seconds,
        warn=warn,
    ) as pool:
        while pool.unfinished:
            answer(pool, pool.asking(), agents)


def answer(pool: Pool, asking: Sequence[Asking], agents: Mapping[str, Agent]) -> None:
    """Give actions to the episodes that ask, each agent for its own as one batch."""
    for name, agent in agents.items():
        own = [one for one in asking if one.episode.agent == name]
        for one, actions in zip(own, agent(own) if own else [], strict=True):
            pool.act(one, actions)
