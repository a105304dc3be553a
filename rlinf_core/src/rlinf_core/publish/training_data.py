"""What a model card says of a dataset: where it is from, how much it is, its cameras and tasks. Without the network."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from rlinf_core.contract.datasets import DatasetConfig, LeRobotDatasetConfig
from rlinf_core.contract.policy_options import TrainedOn
from rlinf_core.data.lerobot.files import find_root
from rlinf_core.data.lerobot.metadata import Metadata, load_metadata
from rlinf_core.errors import UserError
from rlinf_core.hub import cache_only
from rlinf_core.publish.origins import UNKNOWN, Origin, origin_of

CHANNELS = 3


@dataclass(frozen=True)
class DataFacts:
    """A dataset that a policy was trained on."""

    name: str
    """Its name in a mixture; empty if it was the only one."""
    origin: Origin
    format: str
    """`data.config_name`."""
    cameras: tuple[str, ...] = ()
    """What the policy sees: `camera (column, height x width)`."""
    state: tuple[str, ...] = ()
    """Columns of the state."""
    actions: tuple[str, ...] = ()
    """Columns of the action."""
    held_out: str = ""
    """Which episodes were not trained on."""
    episodes: int | None = None
    """Episodes of the dataset; None if its metadata are not on this machine."""
    frames: int | None = None
    fps: float | None = None
    tasks: tuple[str, ...] = ()
    """Instructions."""

    def rows(self) -> Iterator[tuple[str, str]]:
        """What is known, for a table."""
        yield "dataset", f"{f'{self.name}: ' * bool(self.name)}{self.origin}"
        yield "format", f"`{self.format}`"
        numbers = {"episodes": self.episodes, "frames": self.frames, "frames per second": self.fps}
        if self.state or self.actions:
            for name, value in numbers.items():
                yield name, UNKNOWN if value is None else f"{value:,g}" if isinstance(value, float) else f"{value:,}"
        if self.held_out:
            yield "held out", self.held_out
        lists = {"cameras": self.cameras, "state": self.state, "actions": self.actions}
        yield from ((key, ", ".join(value)) for key, value in lists.items() if value)
        if self.tasks:
            yield "tasks", f"{len(self.tasks)}"


def data_facts(source: TrainedOn) -> DataFacts:
    """The facts of a dataset; episodes and tasks only if its metadata are on this machine."""
    data = source.data
    origin = origin_of(data.repo_id, "dataset", data.revision) if data.repo_id else Origin(data.config_name)
    facts = DataFacts(source.name, origin, data.config_name, held_out=_held_out(data))
    if not isinstance(data, LeRobotDatasetConfig):
        return facts
    metadata = _metadata(data)
    images = {camera: (column, _size(metadata, column)) for camera, column in data.images.items()}
    facts = replace(
        facts,
        cameras=tuple(f"{camera} (`{column}`{size})" for camera, (column, size) in images.items()),
        state=tuple(f"`{column}`" for column in data.state),
        actions=tuple(f"`{column}`" for column in data.actions),
    )
    if metadata is None:
        return facts
    texts = tuple(dict.fromkeys(text for text in metadata.task_texts.values() if text.strip()))
    return replace(
        facts, episodes=metadata.total_episodes, frames=metadata.frames, fps=float(metadata.fps), tasks=texts
    )


def _metadata(data: LeRobotDatasetConfig) -> Metadata | None:
    try:
        with cache_only():
            return load_metadata(data.repo_id, find_root(data.repo_id, data.revision), prompts=False)
    except (UserError, OSError):
        return None


def _size(metadata: Metadata | None, column: str) -> str:
    shape = metadata.features.get(column, {}).get("shape") if metadata else None
    if not isinstance(shape, list | tuple) or len(shape) != 3:
        return ""
    height, width = shape[:2] if shape[2] == CHANNELS else shape[1:]
    return f", {height} x {width}"


def _held_out(data: DatasetConfig) -> str:
    if data.validation_episodes:
        return f"{len(data.validation_episodes)} episodes"
    return f"{data.validation_fraction:.0%} of the episodes" if data.validation_fraction else ""
