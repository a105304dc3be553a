"""A run of Trackio."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from rlinf_core.results import ResultTable, cell_text
from rlinf_plugins_trackers.config import TrackioConfig
from rlinf_plugins_trackers.memory import Job, Memory
from rlinf_plugins_trackers.sinks.run_config import run_config

ID_LENGTH = 8
"""Characters of the run's id in its name: names in a project are unique, those of this project's runs need not be."""


def open_sink(config: TrackioConfig, job: Job, memory: Memory) -> TrackioSink:
    """The run with this run's name and id, new or continued."""
    if config.dir:
        os.environ["TRACKIO_DIR"] = config.dir  # Read when the library is imported.
    import trackio

    run = trackio.init(
        project=config.project,
        name=f"{job.name}-{memory.id[:ID_LENGTH]}",
        group=config.group or None,
        space_id=config.space_id or None,
        resume="allow",
        config=run_config(job.folder),
        embed=False,
    )
    return TrackioSink(run, Path(job.folder))


class TrackioSink:
    """The run."""

    def __init__(self, run: Any, folder: Path) -> None:
        self._run, self._folder = run, folder

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Scalars."""
        self._run.log(values, step=step)

    def image(self, step: int, name: str, content: bytes) -> None:
        """An image."""
        import io

        import trackio
        from PIL import Image

        with Image.open(io.BytesIO(content)) as image:
            self._run.log({name: trackio.Image(image.convert("RGB"))}, step=step)

    def video(self, step: int, name: str, path: Path) -> None:
        """A video."""
        import trackio

        self._run.log({name: trackio.Video(str(path))}, step=step)

    def table(self, step: int, name: str, table: ResultTable) -> None:
        """A table, whose cells are texts."""
        import trackio

        rows = [[cell_text(cell) for cell in row] for row in table.rows]
        self._run.log({name: trackio.Table(columns=list(table.columns), data=rows)}, step=step)

    def text(self, step: int, name: str, text: str) -> None:
        """A text."""
        import trackio

        self._run.log({name: trackio.Markdown(text)}, step=step)

    def flush(self) -> None:
        """The library writes in a thread of its own."""

    def finish(self, *, failed: bool) -> None:
        """Finish the run, which waits until everything is written."""
        self._run.finish()
