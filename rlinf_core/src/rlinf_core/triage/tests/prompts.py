"""Do the prompts of the site belong to what its images and motions show?

Two witnesses answer: the most similar training rows, whose prompts are known, where scenes differ between tasks; and
the policy, whose actions fit the recorded ones best with the right prompt. Each is asked about training rows first, and
heard only if it is right about them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from rlinf_core.contract.datasets import SampleSource
from rlinf_core.contract.triage import TriageOutcome
from rlinf_core.results import ResultTable
from rlinf_core.triage.mistakes.corrections import Correction
from rlinf_core.triage.mistakes.rows import Rows, Vectors
from rlinf_core.triage.mistakes.search import resampled
from rlinf_core.triage.scene import Scene

RELIABLE = 0.75
"""Share of training episodes whose prompts a witness must know."""
NEAREST = 5
"""Similar training rows that vote."""
MOST_TASKS = 10
"""Prompts that the policy tries."""
BETTER = 0.05
"""Share by which the squared error must fall with another prompt."""
ROWS = 160
"""Rows of the site on which the policy tries prompts."""
SURE = 0.02
"""Probability that the error falls only because of which episodes were drawn. Few prompts are tried, each for all rows
with the same prompt, so that it need not be smaller."""


def other_tasks(scene: Scene, table: ResultTable) -> TriageOutcome | None:
    """A cause if the prompts are those of other tasks.

    Args:
        scene: With a site.
        table: The prompts, for the page.
    """
    trained = Counter(scene.wide.prompts)
    if len(trained) < 2:
        return None
    # In a simulator, actions of demonstrations are replayed in other scenes: the policy's need not resemble them.
    for witness in (_by_likeness, *((_by_policy,) if scene.simulator is None else ())):
        mapping, share, said = witness(scene, trained)
        if mapping:
            own, guess = next(iter(mapping.items()))
            what = "the prompt of another task" if own in trained else "a prompt that was not trained"
            return TriageOutcome(
                "cause",
                f"{share:.0%} of the site's episodes have {what}: those with {own!r} are of {guess!r}{said}",
                f"Give the policy the prompt of its task: {guess!r}",
                strength=share,
                tables=[table],
            )
    return None


def _by_likeness(scene: Scene, trained: Counter[str]) -> tuple[dict[str, str], float, str]:
    """Prompt -> the prompt of the most similar training rows, where they differ; the share of episodes; how known."""
    likeness, reference = scene.likeness, scene.likeness.reference
    stand_in = _by_episode(
        scene.stand_in, _guessed(likeness.cost_matrix(scene.stand_in, other_episodes=True), reference)
    )
    right = float(np.mean([own == guess for own, guess in stand_in]))
    site = scene.explanation.site
    found = _by_episode(site, _guessed(likeness.cost_matrix(site), reference))
    wrong = Counter((own, guess) for own, guess in found if own != guess)
    share = wrong.total() / len(found)
    if right < RELIABLE or share < 0.5 or share < 3 * (1 - right):
        return {}, 0.0, ""
    mapping: dict[str, str] = {}
    for (own, guess), _ in wrong.most_common():
        mapping.setdefault(own, guess)
    before, after = _errors(scene, mapping)
    said = ", as similar training rows show"
    if after < 0.97 * before:
        said = f"; with it, the action error falls from {before:.2f} to {after:.2f}"
    return mapping, share, said


def _guessed(costs: Vectors, reference: Rows) -> list[str]:
    """The prompt of the most similar training rows of each row."""
    nearest = np.argsort(costs, axis=1)[:, :NEAREST]
    return [Counter(reference.prompts[i] for i in row).most_common(1)[0][0] for row in nearest.tolist()]


def _by_episode(rows: Rows, guessed: Sequence[str]) -> list[tuple[str, str]]:
    """Own and guessed prompt of each episode, by a vote of its rows."""
    found = []
    for episode in np.unique(rows.episodes):
        at = np.flatnonzero(rows.episodes == episode).tolist()
        own = Counter(rows.prompts[i] for i in at).most_common(1)[0][0]
        found.append((own, Counter(guessed[i] for i in at).most_common(1)[0][0]))
    return found


def _errors(scene: Scene, mapping: Mapping[str, str]) -> tuple[float, float]:
    """The action error at the site as it is, and with the prompts of the mapping."""
    assert scene.site is not None
    correction = scene.explanation.correction
    rows, scale = scene.spread_rows(scene.site), scene.action_spread
    changed = correction.then(Correction(prompts=mapping))
    before = scene.act(scene.site, rows, correction).errors(scale).mean()
    after = scene.act(scene.site, rows, changed).errors(scale).mean()
    return float(np.sqrt(before)), float(np.sqrt(after))


def _by_policy(scene: Scene, trained: Counter[str]) -> tuple[dict[str, str], float, str]:
    """Prompt -> the prompt with which the policy's actions fit the recorded ones best, where they differ."""
    assert scene.site is not None
    tasks = [prompt for prompt, _ in trained.most_common(MOST_TASKS)]
    own_rows = _tried(scene, scene.trained, Correction(), tasks, ROWS // 2)
    for prompt in set(own_rows.prompts) & set(tasks):  # The policy must know its own tasks apart.
        if tasks[int(own_rows.mean_of(prompt).argmin())] != prompt:
            return {}, 0.0, ""
    found = _tried(scene, scene.site, scene.explanation.correction, tasks, ROWS)
    mapping: dict[str, str] = {}
    gained = np.zeros(len(found.prompts))
    for prompt in dict.fromkeys(found.prompts):
        best = int(found.mean_of(prompt).argmin())
        if tasks[best] != prompt:
            mapping[prompt] = tasks[best]
            at = [i for i, own in enumerate(found.prompts) if own == prompt]
            gained[at] = found.plain[at] - found.errors[at, best]
    changed = np.array([prompt in mapping for prompt in found.prompts])
    if not changed.any() or changed.mean() < 0.5:
        return {}, 0.0, ""
    before, gain = float(found.plain.mean()), float(gained.mean())
    low = float(np.quantile(resampled(gained, found.episodes, scene.seed), SURE))
    if low <= 0 or gain < BETTER * before:
        return {}, 0.0, ""
    numbers = f"{np.sqrt(before):.2f} to {np.sqrt(max(before - gain, 0)):.2f}"
    return mapping, float(changed.mean()), f"; with it, the action error falls from {numbers}"


class _Tried:
    """Squared errors of the policy's actions with its own prompt and with each task's."""

    def __init__(self, episodes: NDArray[np.int64], prompts: tuple[str, ...], plain: Vectors, errors: Vectors) -> None:
        self.episodes, self.prompts = episodes, prompts
        self.plain = plain
        """[N], with the row's own prompt."""
        self.errors = errors
        """[N, tasks]."""

    def mean_of(self, prompt: str) -> Vectors:
        """[tasks], the mean errors of the rows with a prompt."""
        return np.asarray(self.errors[[own == prompt for own in self.prompts]].mean(0))


def _tried(scene: Scene, source: SampleSource, correction: Correction, tasks: Sequence[str], most: int) -> _Tried:
    rows, scale = scene.spread_rows(source, most), scene.action_spread
    plain = scene.act(source, rows, correction)
    targets = [scene.pipeline.target(row) for row in source.without_images(plain.indices.tolist())]
    prompts = tuple(str(one.get("prompt", "")) for one in targets)
    every = set(prompts)
    errors = [
        scene.act(source, rows, correction.then(Correction(prompts=dict.fromkeys(every, task)))).errors(scale)
        for task in tasks
    ]
    return _Tried(plain.episodes, prompts, plain.errors(scale), np.stack(errors, 1))
