"""The model card of an exported folder: `README.md` with the hub's metadata, from what the run knows.

Nothing is invented: what is not known is said to be unknown. Paths of this machine, accounts and secrets stay out of
it. The last line holds a digest of the rest, by which a model card that somebody has edited is recognised.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlinf_core.contract.policy_options import CardNotes
from rlinf_core.contract.run import RunConfig
from rlinf_core.files import write_text
from rlinf_core.publish.exported import NATIVE, Exported
from rlinf_core.publish.measured import BASELINES, Measured
from rlinf_core.publish.origins import README, UNKNOWN, Origin, origin_of
from rlinf_core.publish.privacy import private
from rlinf_core.publish.recipe import config_text, packages_of, recipe_rows
from rlinf_core.publish.training_data import DataFacts, data_facts
from rlinf_core.results import as_markdown, cell_text

MOST_TASKS = 20
"""Instructions that a model card lists."""
MARK = re.compile(r"<!-- written by rlinf export, sha256 of the text above: ([0-9a-f]{64}) -->\n?\Z")


def write_card(folder: Path, exported: Exported) -> None:
    """Write the model card of an exported folder, which has none yet."""
    text = render(exported)
    write_text(folder / README, text + mark_of(text))


def mark_of(text: str) -> str:
    """The last line of a model card with this text."""
    return f"<!-- written by rlinf export, sha256 of the text above: {hashlib.sha256(text.encode()).hexdigest()} -->\n"


def is_edited(text: str) -> bool:
    """Whether somebody has changed or written this model card; a lost last line counts."""
    found = MARK.search(text)
    return found is None or hashlib.sha256(text[: found.start()].encode()).hexdigest() != found[1]


def render(exported: Exported) -> str:
    """The card's text, without its last line."""
    run = exported.run
    notes = run.policy.card(exported.format, exported.sources)
    base = _base(run)
    data = [data_facts(one) for one in exported.sources]
    sections = {
        "Use": notes.use or _use(exported),
        "Training data": "\n\n".join(_data_section(exported, facts) for facts in data),
        "Recipe": _recipe(exported, base),
        "Results": _results(exported.measured),
        "Licences": _licences(exported, base, data),
        "Limits": "\n".join(f"- {limit}" for limit in _limits(exported, notes, data)),
    }
    name = run.runner.name
    body = [f"# {name}", _summary(exported, notes, base, data)]
    body += [f"## {title}\n\n{text.strip()}" for title, text in sections.items() if text.strip()]
    head = _metadata(exported, notes, base, data)
    return f"---\n{head.strip()}\n---\n\n" + private("\n\n".join(body)) + "\n\n"


def _base(run: RunConfig) -> Origin | None:
    """The weights that training started from; None for a run from its initial values."""
    if run.policy.weights in ("", "random"):
        return None
    return origin_of(run.policy.weights, "model", setting="policy.weights")


def _metadata(exported: Exported, notes: CardNotes, base: Origin | None, data: Sequence[DataFacts]) -> str:
    """The YAML at the head, by the hub's own client. No key without a value: the hub refuses `datasets: [null]`."""
    from huggingface_hub import EvalResult, ModelCardData

    policy = exported.run.policy
    acts = policy.chunk_length() > 0
    tag = notes.pipeline_tag or ("robotics" if acts else "")
    tags = [
        "rlinf",
        *(["robotics"] if acts else []),
        policy.type,
        *notes.tags,
        *(["lora"] if exported.adapters else []),
    ]
    results = []
    for one in exported.measured.tables:
        if (found := one.overall()) is None:
            continue
        rate, episodes = found
        env = one.table.title.removeprefix("Success in ")
        results.append(
            EvalResult(
                task_type=tag or "robotics",
                dataset_type=env,
                dataset_name=env,
                metric_type="success_rate",
                metric_name=f"success rate, {episodes} episodes, 95 % interval {rate.low:.3f} to {rate.high:.3f}",
                metric_value=round(rate.value, 4),
            )
        )
    more: dict[str, Any] = {}
    if base is not None and base.hub_id:
        more["base_model_relation"] = "adapter" if exported.adapters else "finetune"
    card = ModelCardData(
        license=exported.licence or UNKNOWN,
        library_name=notes.library or NATIVE,
        pipeline_tag=tag or None,
        tags=list(dict.fromkeys(tags)),
        datasets=list(dict.fromkeys(one.origin.hub_id for one in data if one.origin.hub_id)) or None,
        base_model=(base.hub_id or None) if base else None,
        model_name=exported.run.runner.name,
        eval_results=results or None,
        **more,
    )
    if not results:
        card.model_name = None
    return str(card.to_yaml())


def _summary(exported: Exported, notes: CardNotes, base: Origin | None, data: Sequence[DataFacts]) -> str:
    run = exported.run
    kind = notes.title or f"`{run.policy.type}`"
    began = f", from {base}" if base else ", from its initial values"
    weights = "the moving average (EMA) of the weights" if exported.ema else "the weights as trained"
    what = "adapters, without the weights that they belong to" if exported.adapters else weights
    on = ", ".join(str(one.origin) for one in data)
    return (
        f"{kind}, fine-tuned with rlinf-core on {on}{began}. This repository has "
        f"{what}, after {exported.step:,} steps, in {exported.dtype}, in the layout of {exported.format}."
    )


def _use(exported: Exported) -> str:
    """How to run a folder in this project's own layout."""
    if exported.format != NATIVE or not exported.run.policy.chunk_length():
        return ""
    several = len(exported.sources) > 1
    source = f', source="{exported.sources[0].name}"' if several else ""
    base = ', base="THE WEIGHTS THEY BELONG TO"' if exported.adapters else ""
    columns = list(exported.sources[0].data.observation_columns())
    observation = ", ".join(f'"{name}": ...' for name in dict.fromkeys([*columns, "task"]))
    lines = [
        "`FOLDER` is a copy of this repository: `hf download OWNER/NAME --local-dir FOLDER`.",
        "",
        "```python",
        "from rlinf_core import load_policy",
        "",
        f'policy = load_policy("FOLDER"{source}{base})',
        f"actions = policy.infer({{{observation}}})  # [{exported.run.policy.chunk_length()}, D], in the data's units",
        "```",
        "",
    ]
    if not exported.adapters:
        lines.append("`rlinf serve FOLDER` answers robots and simulators that speak openpi's protocol.")
    lines += ["", f"It needs the Python packages {', '.join(f'`{name}`' for name in packages_of(exported))}."]
    return "\n".join(lines)


def _data_section(exported: Exported, facts: DataFacts) -> str:
    rows = dict(facts.rows())
    digest = exported.digests.get(facts.name)
    normalization = exported.run.policy.normalization
    if digest:
        rows["normalization"] = f"{normalization}, statistics with SHA-256 `{digest}`"
    elif normalization == "none":
        rows["normalization"] = "none"
    text = _two_columns(rows)
    if not facts.tasks:
        return text
    listed = [f"- {_inline(task)}" for task in facts.tasks[:MOST_TASKS]]
    if len(facts.tasks) > MOST_TASKS:
        listed.append(f"- and {len(facts.tasks) - MOST_TASKS} more")
    return "\n".join([text, "", "Tasks:", "", *listed])


def _recipe(exported: Exported, base: Origin | None) -> str:
    rows = {"base weights": str(base) if base else "none: from initial values", **recipe_rows(exported)}
    text = config_text(exported.run)
    return "\n".join(
        [
            _two_columns(rows),
            "",
            "<details><summary>Config</summary>",
            "",
            "```toml",
            text.strip(),
            "```",
            "",
            "</details>",
        ]
    )


def _results(measured: Measured) -> str:
    """What was measured, or that nothing was."""
    parts = []
    if measured.validation:
        rows = {f"`{name}`": cell_text(value) for name, value in measured.validation.items()}
        parts.append("The run's validation, without intervals:\n\n" + _two_columns(rows, ("metric", "value")))
        if any(name.endswith(BASELINES) for name in measured.validation):
            parts.append("Baselines: `_mean` is always the mean action, `_repeat` repeats the last action.")
    for one in measured.tables:
        facts = ", ".join(f"{key} {value}" for key, value in one.facts.items())
        measured_by = f"Measured by {one.source}{', with ' * bool(facts)}{facts}."
        parts.append(f"{as_markdown(one.shown()).strip()}\n\n{measured_by}")
    if not any(one.is_simulator for one in measured.tables):
        parts.append("No success rate was measured.")
    return "\n\n".join(parts)


def _licences(exported: Exported, base: Origin | None, data: Sequence[DataFacts]) -> str:
    rows = {"this model": exported.licence or f"{UNKNOWN}: nobody has chosen one"}
    if base:
        rows[f"base weights, {base}"] = base.licence
    rows |= {f"dataset {one.origin}": one.origin.licence for one in data}
    said = "What the README files of base weights and datasets say; `unknown`: there was none, or it names no licence."
    return _two_columns(rows, ("of", "licence")) + f"\n\n{said}"


def _limits(exported: Exported, notes: CardNotes, data: Sequence[DataFacts]) -> Iterator[str]:
    yield from notes.limits
    if exported.run.policy.chunk_length():
        known = [one for one in data if one.tasks]
        if known:
            count = sum(len(one.tasks) for one in known)
            yield f"It was trained on {count} instruction{'s' * (count != 1)}, listed above; others are untested."
        yield "A small error on recorded episodes does not mean that the policy succeeds on a robot."
    if exported.adapters:
        yield "The adapters act only with the weights that they were trained on."
    if len(exported.sources) > 1:
        yield "Each dataset has its own statistics: `source` chooses whose observations and actions are meant."


def _two_columns(rows: Mapping[str, str], head: tuple[str, str] = ("", "")) -> str:
    lines = [f"| {head[0]} | {head[1]} |", "|---|---|"]
    return "\n".join([*lines, *(f"| {_inline(key)} | {_inline(value)} |" for key, value in rows.items())])


def _inline(text: str) -> str:
    """Text of one line that is no markup; code in backticks stays code."""
    text = " ".join(text.split())
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("[", "\\[") if text else ""
