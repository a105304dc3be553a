"""An experiment of SwanLab."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

from rlinf_core.results import ResultTable, as_markdown
from rlinf_plugins_trackers.config import SwanLabConfig
from rlinf_plugins_trackers.memory import Job, Memory
from rlinf_plugins_trackers.sinks.animation import as_gif
from rlinf_plugins_trackers.sinks.run_config import run_config

ID_LENGTH = 21
"""Characters of an experiment's id."""


def open_sink(config: SwanLabConfig, job: Job, memory: Memory) -> SwanLabSink:
    """The experiment with this run's id, new or continued."""
    os.environ.setdefault("SWANLAB_INTERACTIVE", "0")  # Nobody can answer a question.
    import swanlab

    folder = Path(job.folder) / "swanlab"
    folder.mkdir(parents=True, exist_ok=True)
    run = swanlab.init(
        project=config.project,
        workspace=config.workspace or None,
        name=job.name,
        group=config.group or None,
        tags=list(config.tags) or None,
        description=config.description or None,
        mode=config.mode,
        log_dir=str(folder),
        id=memory.id[:ID_LENGTH],
        resume="allow",
        config=run_config(job.folder),
    )
    return SwanLabSink(run)


class SwanLabSink:
    """The experiment."""

    def __init__(self, run: Any) -> None:
        self._run = run

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Scalars."""
        self._run.log(values, step=step)

    def image(self, step: int, name: str, content: bytes) -> None:
        """An image."""
        import swanlab
        from PIL import Image

        with Image.open(io.BytesIO(content)) as image:
            self._run.log({name: swanlab.Image(image.convert("RGB"))}, step=step)

    def video(self, step: int, name: str, path: Path) -> None:
        """A video as a GIF: SwanLab shows no other."""
        import swanlab

        self._run.log({name: swanlab.Video(as_gif(path)[0])}, step=step)

    def table(self, step: int, name: str, table: ResultTable) -> None:
        """A table as Markdown."""
        self.text(step, name, as_markdown(table))

    def text(self, step: int, name: str, text: str) -> None:
        """A text."""
        import swanlab

        self._run.log({name: swanlab.Text(text)}, step=step)

    def flush(self) -> None:
        """The library writes in a thread of its own."""

    def finish(self, *, failed: bool) -> None:
        """Finish the experiment, which waits for uploads."""
        if failed:
            self._run.finish("crashed", error="the run ended with an error")
        else:
            self._run.finish()
