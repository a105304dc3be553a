"""`rlinf eval --env`: how often a policy succeeds in a simulator."""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlinf_core.commands.eval_served import served
from rlinf_core.commands.evaluated import load_evaluated
from rlinf_core.commands.output import print_json, print_table, print_text
from rlinf_core.errors import UserError

if TYPE_CHECKING:
    from rlinf_core.contract.datasets import SampleSource
    from rlinf_core.exported import Exported
    from rlinf_core.inference import LoadedPolicy
    from rlinf_core.plugins.registry import Plugins
    from rlinf_core.results import ResultTable
    from rlinf_core.rollout.agents import Agent
    from rlinf_core.rollout.config import RolloutSettings
    from rlinf_core.rollout.delay import Latency
    from rlinf_core.rollout.episodes import Episode, EpisodesFile, Result

ONLY_WITH_ENV = ("tasks", "replan", "processes", "videos", "baselines", "set", "delay", "chunks")
RECORDED = {"split": None, "samples": 512, "batch_size": 16, "sampling": None}
"""Options of recorded episodes, and their defaults."""


def add_simulator_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of simulators."""
    group = parser.add_argument_group("in a simulator")
    group.add_argument("--env", metavar="NAME", help="an environment of a plugin, such as metaworld")
    group.add_argument("--tasks", metavar="A,B", help="tasks, by name or number; default: those of the run, or all")
    group.add_argument("--replan", type=int, metavar="N", help="actions of a chunk to execute before looking again")
    group.add_argument("--processes", type=int, metavar="N", help="processes of the environment; default: 2")
    group.add_argument("--videos", type=int, metavar="N", help="successes and failures per task to film; default: 1")
    group.add_argument(
        "--baselines", metavar="A,B", help="of idle, random and replay, or none; default: those that can be played"
    )
    group.add_argument(
        "--delay", type=int, metavar="N", help="actions from an observation to the first use of its chunk; default: 0"
    )
    group.add_argument(
        "--chunks",
        choices=["wait", "switch", "guided", "trained"],
        help="what the robot does under --delay: idle, go on with the last chunk and switch to the next, or real-time "
        "chunking; default: wait",
    )
    group.add_argument(
        "--set",
        action="append",
        metavar="key=value",
        help="a key of [evaluators.simulator], such as env.image_size=224; may be repeated",
    )


def check_no_simulator(options: argparse.Namespace) -> None:
    """Raise `UserError` if options of simulators are given without one."""
    if given := [name for name in ONLY_WITH_ENV if getattr(options, name) is not None]:
        raise UserError(f"--{given[0]} is for a simulator: add --env NAME")


def play_episodes(options: argparse.Namespace) -> None:
    """Play, print the table, and write the files."""
    from rlinf_core.plugins.registry import get_plugins
    from rlinf_core.rollout.tables import success_table

    if given := [name for name, default in RECORDED.items() if getattr(options, name) != default]:
        raise UserError(f"--{given[0].replace('_', '-')} is for recorded episodes: leave it out with --env")
    plugins = get_plugins()
    plugins.environment(options.env)  # Before what takes seconds.
    settings, remembered = read_settings(options, plugins)
    settings.chosen_tasks()
    with ExitStack() as ending:
        acting, described, facts, latency = _open_policy(options, plugins, settings, ending)
        notes = [*facts["notes"], *remembered]
        agents, step_seconds = build_agents(options, acting, described, plugins, settings, notes)
        if latency is not None and step_seconds:
            notes.append(f"the policy's actions come {latency.delay * step_seconds * 1e3:.0f} ms late")
        identity = _identity(options, facts, settings, latency)
        folder = _folder(options, facts, settings, identity)
        kept = folder or Path(ending.enter_context(tempfile.TemporaryDirectory(prefix="rollouts-")))
        results = _play(settings, agents, kept, identity, step_seconds)
        table = success_table(settings, results, latency)
        result = _result(options, facts, settings, results, table)
        if latency is not None:
            result["latency"] = latency.model_dump(mode="json")
        _write(options, folder, result, table)
    if options.json:
        print_json(result)
        return
    for note in notes:
        print_text(note)
    _print(table, results, folder, options)


def read_settings(options: argparse.Namespace, plugins: Plugins) -> tuple[RolloutSettings, list[str]]:
    """The settings: those that the run or the exported folder remembers of this environment, then the options.

    Returns:
        The settings, and a sentence about what was remembered.

    Raises:
        UserError: They are invalid; the message has all mistakes.
    """
    from pydantic import ValidationError

    from rlinf_core.config.toml import merge, parse_override
    from rlinf_core.contract.registered import PLUGINS
    from rlinf_core.rollout.config import RolloutSettings

    table, notes = _remembered(options, plugins)
    given: dict[str, Any] = {name: getattr(options, name) for name in ("processes", "videos", "seed")}
    given["tasks"] = [one.strip() for one in options.tasks.split(",")] if options.tasks else None
    given["episodes"] = _count(options.episodes)
    if options.baselines is not None:
        given["baselines"] = [one for one in options.baselines.replace(" ", "").split(",") if one not in ("", "none")]
    if options.replan is not None:
        given["env"] = {"replan": options.replan}
    table = merge(table, {name: value for name, value in given.items() if value is not None})
    for text in options.set or ():
        table = merge(table, parse_override(text))
    try:
        return RolloutSettings.model_validate(table, context={PLUGINS: plugins}), notes
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors(include_url=False)]
        raise UserError(
            "\n".join([f"--env {options.env}: {len(lines)} of its settings are invalid", *lines])
        ) from error


def _remembered(options: argparse.Namespace, plugins: Plugins) -> tuple[dict[str, Any], list[str]]:
    """The environment of the run's own evaluator, if it is this one."""
    from rlinf_core.contract.weights.origin import DESCRIPTION
    from rlinf_core.untrusted.text import read_json

    folder = Path(options.policy or "")
    found: Any = None
    if (folder / DESCRIPTION).is_file():
        found = read_json(folder / DESCRIPTION).get("simulator")
    elif (folder / "config.toml").is_file():
        from rlinf_core.config.toml import read_toml

        found = read_toml((folder / "config.toml").read_text()).get("evaluators", {}).get("simulator")
    env = found.get("env") if isinstance(found, Mapping) else None
    env = {"type": env} if isinstance(env, str) else env
    if not isinstance(env, Mapping) or env.get("type") != options.env:
        return {"env": {"type": options.env}}, []
    changed = ", ".join(f"{key} = {value!r}" for key, value in env.items() if key != "type")
    tasks = {"tasks": list(found["tasks"])} if found.get("tasks") else {}
    return {"env": dict(env), **tasks}, [f"{options.env} as in the run: {changed}"] if changed else []


def _count(episodes: Sequence[int]) -> int | None:
    if len(episodes) > 1:
        raise UserError("--episodes with --env is a number, of episodes per task: for example --episodes 20")
    return episodes[0] if episodes else None


def build_agents(
    options: argparse.Namespace,
    acting: Agent,
    described: LoadedPolicy | Exported | None,
    plugins: Plugins,
    settings: RolloutSettings,
    notes: list[str],
) -> tuple[dict[str, Agent], float]:
    """The policy and the baselines that can be played, and the seconds between actions in the data (0: unknown)."""
    from rlinf_core.rollout.agents import POLICY, build_baselines, demonstrations_of, seconds_per_action

    rows = _rows(options, described, plugins, notes)
    prompts = [task.prompt for task in settings.chosen_tasks()]
    found = {}
    if described is not None and rows is not None and "replay" in settings.baselines:
        found = demonstrations_of(rows, described.pipeline, prompts)
        if missing := [prompt for prompt in dict.fromkeys(prompts) if prompt not in found]:
            notes.append(f"no blind replay of {missing[0]!r}: the dataset has no episode with this instruction")
    policies: dict[str, Agent] = {POLICY: acting}
    return policies | build_baselines(settings.baselines, settings.env, found), seconds_per_action(
        rows
    ) if rows else 0.0


def _open_policy(
    options: argparse.Namespace, plugins: Plugins, settings: RolloutSettings, ending: ExitStack
) -> tuple[Agent, LoadedPolicy | Exported | None, dict[str, Any], Latency | None]:
    """Who acts, what is known here of its data, facts about it, and its delay."""
    from rlinf_core.rollout.agents import PolicyAgent
    from rlinf_core.rollout.delay import DelayedAgent
    from rlinf_core.terminal import print_phase

    if options.server:
        if given := [name for name in ("delay", "chunks") if getattr(options, name) is not None]:
            raise UserError(f"--{given[0]} is for a policy in this process: leave it out with --server")
        print_phase(f"connecting to {options.server}")
        from rlinf_core.serving.remote import ServedAgent

        remote, opened, facts = ending.enter_context(served(options, plugins))
        return ServedAgent(remote, settings.env.replan), opened, facts, None
    print_phase(f"loading {options.policy}")
    policy, facts = load_evaluated(options, plugins)
    if not policy.config.chunk_length():
        raise UserError(f"the policy {policy.config.type!r} has no actions: it cannot act in a simulator")
    replan, latency = settings.env.replan, read_latency(options, policy)
    if latency is None:
        return PolicyAgent(policy.act, replan), policy, facts, None
    executed = latency.executed(replan, policy.config.chunk_length())
    return DelayedAgent(policy.act, latency, executed), policy, facts, latency


def _rows(
    options: argparse.Namespace, policy: LoadedPolicy | Exported | None, plugins: Plugins, notes: list[str]
) -> SampleSource | None:
    """The demonstrations: of --dataset, or those that the policy was trained on if they are a folder here."""
    if policy is None:
        notes.append("no blind replay: without the exported folder that the server serves, no demonstrations are known")
        return None
    from rlinf_core.data.splits import open_rows_of
    from rlinf_core.offline_eval import other_dataset

    if options.dataset:
        return open_rows_of(other_dataset(policy.data, options.dataset), policy.config, plugins, "train", images=False)
    if policy.data.repo_id and not Path(policy.data.repo_id).is_dir():
        notes.append(
            f"no blind replay: {policy.data.repo_id} is not a folder here; name its demonstrations by --dataset"
        )
        return None
    try:
        return open_rows_of(policy.data, policy.config, plugins, "train", images=False)
    except UserError as error:
        notes.append(f"no blind replay: {error}")
        return None


def read_latency(options: argparse.Namespace, policy: LoadedPolicy) -> Latency | None:
    """The delay of the policy; None without `--delay` and `--chunks`.

    Raises:
        UserError: The policy cannot continue chunks in this way or with this delay.
    """
    from rlinf_core.rollout.delay import Latency

    if options.delay is None and options.chunks is None:
        return None
    if (delay := options.delay or 0) < 0:
        raise UserError(f"--delay is {delay}, but must be 0 or more")
    latency = Latency(delay=delay, chunks=options.chunks or "wait")
    ways = {"wait": delay, "switch": delay, **policy.config.continuation_ways()}
    if latency.chunks not in ways:
        why = ": it was not trained with policy.rtc_training_max_delay" if latency.chunks == "trained" else ""
        raise UserError(f"--chunks {latency.chunks}: the policy {policy.config.type!r} does not offer it{why}")
    if delay > ways[latency.chunks]:
        raise UserError(
            f"--delay {delay}: --chunks {latency.chunks} of this policy takes at most {ways[latency.chunks]}"
        )
    return latency


def _identity(
    options: argparse.Namespace, facts: Mapping[str, Any], settings: RolloutSettings, latency: Latency | None
) -> dict[str, Any]:
    """What results depend on: a second start continues if it is the same."""
    digest = hashlib.sha256(facts["identity"]).hexdigest()[:16]
    delayed = {} if latency is None else {"latency": latency.model_dump(mode="json")}
    return {
        "policy": digest,
        "ema": facts["ema"],
        "dtype": options.dtype,
        "source": options.source,
        **({} if options.num_steps is None else {"num_steps": options.num_steps}),
        **({"server": True} if options.server else {}),
        **delayed,
    } | settings.identity()


def _folder(
    options: argparse.Namespace, facts: Mapping[str, Any], settings: RolloutSettings, identity: Mapping[str, Any]
) -> Path | None:
    """Where the episodes file and videos are kept; None: nowhere."""
    from rlinf_core.files import check_writable
    from rlinf_core.results import EMA, FOLDER

    if options.output:
        check_writable(Path(options.output), "Name another file with --output", file=True)
        path = Path(options.output)
        return path.with_name(f"{path.stem}_episodes")
    if facts["run"] is None:
        return None
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
    step = f"{EMA * facts['ema']}step_{facts['step']:09d}"
    folder: Path = facts["run"] / FOLDER / settings.env.type / step / digest
    return folder


def _play(
    settings: RolloutSettings,
    agents: Mapping[str, Agent],
    folder: Path,
    identity: Mapping[str, Any],
    step_seconds: float,
) -> list[Result]:
    """Play what the episodes file lacks."""
    from rlinf_core.rollout.episodes import FILE, EpisodesFile, in_order, plan_episodes
    from rlinf_core.rollout.play import play
    from rlinf_core.rollout.pool import episodes_left
    from rlinf_core.terminal import print_progress, warn

    planned = [
        one for one in plan_episodes(agents, settings.chosen_tasks(), settings.episodes, settings.seed) if agents
    ]
    planned = [one for one in planned if _can_play(agents[one.agent], one)]
    file: EpisodesFile = EpisodesFile(folder / FILE, identity)
    with print_progress("playing", "episodes") as progress:

        def finished(result: Result) -> None:
            file.add(result)
            progress(len(planned) - len(episodes_left(planned, file.results)), len(planned))

        left = episodes_left(planned, file.results)
        progress(len(planned) - len(left), len(planned))
        play(settings, left, agents, folder=folder, finished=finished, step_seconds=step_seconds, warn=warn)
    return in_order(file.results.values(), planned)


def _can_play(agent: Agent, episode: Episode) -> bool:
    """Whether there is a demonstration of the task, for an agent that replays them."""
    from rlinf_core.rollout.agents import Replay

    return not isinstance(agent, Replay) or episode.task.prompt in agent.demonstrations


def _result(
    options: argparse.Namespace,
    facts: Mapping[str, Any],
    settings: RolloutSettings,
    results: Sequence[Result],
    table: ResultTable,
) -> dict[str, Any]:
    """What --json prints."""
    return {
        "policy": options.policy,
        "step": facts["step"],
        "weights": "ema" if facts["ema"] else "live",
        "settings": settings.model_dump(mode="json"),
        "facts": dict(settings.env.facts()),
        "table": json.loads(table.to_json()),
        "episodes": [one.model_dump() for one in results],
    }


def _write(options: argparse.Namespace, folder: Path | None, result: Mapping[str, Any], table: ResultTable) -> None:
    from rlinf_core.files import write_bytes, write_text, writing
    from rlinf_core.results import TABLE

    if folder is not None:
        write_bytes(folder / f"success{TABLE}", table.to_json())
    if options.output:
        path = Path(options.output)
        with writing(path, "Name another file with --output"):
            write_text(path, json.dumps(result) + "\n")


def _print(table: ResultTable, results: Sequence[Result], folder: Path | None, options: argparse.Namespace) -> None:
    from rlinf_core.results import cell_text

    print_text(table.title)
    print_table(table.columns, [[cell_text(cell) for cell in row] for row in table.rows])
    print_text(table.note)
    if folder is None:
        print_text("--output FILE keeps the episodes and videos, and continues after an interruption")
        return
    videos = sum(bool(one.video) for one in results)
    print_text(f"{folder}: {len(results)} episodes, {videos} videos")
    if options.output:
        print_text(f"{options.output}: written")
