"""What pretrained weights were trained with, by the files beside them, compared with a run.

`rlinf export` leaves `rlinf.json` and statistics beside the weights. A run that continues from them with other
statistics, another horizon or other transforms starts from a policy that reads and writes other numbers. Policies that
read other projects' folders compare those files themselves (`Checked.contradictions`). Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from rlinf_core.data.normalize import EPSILON, KEYS, Mode, NormStats, Stats, Vector, load_norm_stats
from rlinf_core.errors import UserError
from rlinf_core.untrusted.text import path_inside, read_json

if TYPE_CHECKING:
    from rlinf_core.contract.datasets import DatasetConfig

DESCRIPTION = "rlinf.json"
"""The description in an exported folder."""
STATISTICS = "norm_stats.json"
APART = 0.25
"""Statistics that normalise the same number further apart than this are reported."""
NO_SPREAD = 10 * EPSILON


class Contradiction(NamedTuple):
    """A difference between what the weights were trained with and the run; core reports it as a warning."""

    id: str
    """Its name, as docs/statistics.md lists it."""
    message: str
    """What differs, with both values and the file."""
    way_out: str
    key: str = ""
    """`state`, `actions`, or empty if it concerns everything."""
    dimensions: tuple[int, ...] = ()
    """Affected dimensions of the vector, counted from 0."""


def folder_of(weights: str | Path) -> Path | None:
    """The local folder that holds the weights; None if there is none."""
    path = Path(weights).expanduser()
    folder = path.parent if path.is_file() else path
    return folder if folder.is_dir() else None


def compare_statistics(file: Path, theirs: Stats, ours: Stats, mode: Mode) -> list[Contradiction]:
    """Compare the statistics beside the weights with those of the run.

    Args:
        file: Where theirs are from.
        theirs: Statistics that the weights were trained with; may be padded, and may lack quantiles.
        ours: Statistics of the run.
        mode: The policy's normalisation.
    """
    found: list[Contradiction] = []
    for key in KEYS:
        if key in theirs and key in ours:
            found += _compare_key(file, key, theirs[key], ours[key], mode)
    return found


def _compare_key(file: Path, key: str, theirs: NormStats, ours: NormStats, mode: Mode) -> Iterator[Contradiction]:
    width, their_width = len(ours.mean), _width(theirs)
    if their_width > width or len(theirs.mean) < width:
        yield Contradiction(
            "weights-width",
            f"the weights come with statistics of {their_width} numbers ({file}), the run has {width}",
            "They are of another robot or other columns: check data.state, data.actions and the format's transforms",
            key,
        )
        return
    known = "mean_std" if np.isnan(theirs.q01).any() or np.isnan(ours.q01).any() else mode
    apart = _apart(theirs.cut(width), ours, known)
    where = np.flatnonzero(apart > APART)
    if where.size:
        unit = "standard deviations" if known == "mean_std" else "normalised units (the run's data span 2)"
        way_out = f'Set data.norm_stats = "{file}" to go on with theirs'
        if file.suffix != ".json":
            way_out = f"Go on with theirs: `rlinf norm-stats --import {file} --from lerobot --output norm_stats.json`"
        yield Contradiction(
            "weights-statistics",
            f"the weights come with other statistics ({file}), which differ by up to {apart.max():.3g} {unit}",
            f"{way_out}. Otherwise training first has to undo the difference, and a short run makes the policy worse",
            key,
            tuple(where.tolist()),
        )


def _width(stats: NormStats) -> int:
    """Dimensions without padding, which has mean 0 and no spread, or spread 1."""
    used = (stats.mean != 0) | ((stats.std > NO_SPREAD) & (stats.std != 1))
    return int(np.flatnonzero(used).max(initial=-1)) + 1


def _apart(theirs: NormStats, ours: NormStats, mode: Mode) -> Vector:
    """[D], how far apart the two normalise the ends of the run's range."""
    ends: tuple[Vector, Vector]
    middles: tuple[Vector, Vector]
    if mode == "mean_std":
        ends = (ours.mean - 2 * ours.std, ours.mean + 2 * ours.std)
        middles = theirs.mean, ours.mean
    else:
        ends = (ours.q01, ours.q99)
        middles = (theirs.q01 + theirs.q99) / 2, (ours.q01 + ours.q99) / 2
    spreads = [np.maximum(one.spread(mode), NO_SPREAD) for one in (theirs, ours)]
    apart = np.max([abs((x - middles[0]) / spreads[0] - (x - middles[1]) / spreads[1]) for x in ends], axis=0)
    # Without spread in the run's data there is nothing to compare: the statistics' own findings report it.
    return np.asarray(np.where(ours.spread(mode) > NO_SPREAD, apart, 0.0))


def compare_with_export(
    folder: Path, policy: object, data: DatasetConfig, stats: Stats | None, mode: str, keys: Sequence[str]
) -> list[Contradiction]:
    """Compare a run with a folder that `rlinf export` wrote; empty if it is another folder.

    Args:
        folder: The folder of the weights.
        policy: The run's policy config.
        data: The run's dataset.
        stats: The run's statistics.
        mode: The policy's normalisation.
        keys: Keys of `[policy]` that weights depend on.
    """
    try:
        description = read_json(folder / DESCRIPTION)
    except (OSError, ValueError):
        return []
    found: list[Contradiction] = []
    file = folder / DESCRIPTION
    theirs, ours = table(table(description).get("policy")), {key: getattr(policy, key) for key in keys}
    for key in keys:
        if key in theirs and theirs[key] != ours[key]:
            id = "weights-horizon" if key == "action_horizon" else "weights-prompt"
            said = f"the weights were trained with policy.{key} = {shown(theirs[key])} ({file}), the run has "
            found.append(Contradiction(id, f"{said}{shown(ours[key])}", f"Set policy.{key} = {shown(theirs[key])}"))
    entry = _entry(table(table(description).get("data")), data)
    found += _compare_data(file, entry, data)
    try:
        statistics = path_inside(folder, f"norm_stats/{entry['name']}.json" if "name" in entry else STATISTICS)
    except ValueError:
        return found
    if stats is not None and mode != "none" and statistics.is_file():
        try:
            normalization: Mode = "quantile" if mode == "quantile" else "mean_std"
            found += compare_statistics(statistics, load_norm_stats(statistics), stats, normalization)
        except UserError:
            return found
    return found


def _entry(described: Mapping[str, Any], data: DatasetConfig) -> Mapping[str, Any]:
    """The table of the dataset, or of the entry of a mixture with the run's format."""
    entries = described.get("mixture")
    if not isinstance(entries, list):
        return described
    tables = [table(one) for one in entries]
    same = [one for one in tables if one.get("config_name") == getattr(data, "config_name", None)]
    return next((one for one in (*same, *tables) if isinstance(one.get("name"), str)), {})


UNRELATED = frozenset(
    {"config_name", "repo_id", "revision", "norm_stats", "norm_floor", "stats_need_images", "assets", "num_workers"}
    | {"shuffle", "streams", "stream_of", "chunk_frames", "shuffle_buffer", "download_limit_gb"}
    | {"validation_fraction", "validation_episodes"}
    | {"validation_tasks", "episodes", "exclude_episodes", "tasks", "min_episode_length", "max_episode_length"}
    | {"quality_column", "min_quality", "decoder", "cache", "cache_quality", "cache_dir", "state", "actions"}
    | {"prompt_from_task", "default_prompt", "images"}
)
"""Keys of `[data]` on which the meaning of the policy's numbers does not depend."""


def _compare_data(file: Path, theirs: Mapping[str, Any], data: DatasetConfig) -> Iterator[Contradiction]:
    ours = data.model_dump(mode="json")
    cameras, own = set(table(theirs.get("images"))), set(table(ours.get("images")))
    if "images" in theirs and cameras != own:
        yield Contradiction(
            "weights-cameras",
            f"the weights were trained with the cameras {listed(cameras)} ({file}), the run has {listed(own)}",
            "Name the same cameras in data.images, if the dataset has them",
        )
    if theirs.get("config_name") != ours.get("config_name"):
        return
    for key in sorted(theirs.keys() & ours.keys() - UNRELATED):
        if theirs[key] != ours[key]:
            yield Contradiction(
                "weights-data",
                f"the weights were trained with data.{key} = {shown(theirs[key])} ({file}), the run has "
                f"{shown(ours[key])}",
                f"Set data.{key} = {shown(theirs[key])}, unless the robots differ in it",
            )


def table(value: object) -> dict[str, Any]:
    """A table of a file that somebody else wrote; empty if it is something else."""
    return value if isinstance(value, dict) else {}


def listed(names: set[str]) -> str:
    """Names in order."""
    return ", ".join(sorted(names)) or "none"


def shown(value: object) -> str:
    """A value as TOML has it; cut if it is long."""
    text = str(value).lower() if isinstance(value, bool) else repr(value).replace("'", '"')
    return text if len(text) <= 60 else text[:57] + "..."
