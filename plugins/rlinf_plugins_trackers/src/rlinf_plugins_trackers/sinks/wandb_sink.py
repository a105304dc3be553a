"""A run of Weights & Biases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import wandb

from rlinf_core.results import ResultTable, cell_text
from rlinf_plugins_trackers.config import WandbConfig
from rlinf_plugins_trackers.memory import Job, Memory
from rlinf_plugins_trackers.sinks.run_config import run_config


def open_sink(config: WandbConfig, job: Job, memory: Memory) -> WandbSink:
    """The run with this run's id, new or continued."""
    run = wandb.init(
        project=config.project,
        entity=config.entity or None,
        group=config.group or None,
        job_type=config.job_type or None,
        tags=list(config.tags) or None,
        notes=config.notes or None,
        mode=config.mode or None,
        id=memory.id,
        resume="allow",
        name=job.name,
        dir=job.folder,
        config=run_config(job.folder),
        settings=wandb.Settings(console="off", disable_git=True, x_disable_meta=False),
    )
    return WandbSink(run)


class WandbSink:
    """The run. A step is wandb's own: it merges what is logged for a step, and steps never decrease."""

    def __init__(self, run: Any) -> None:
        self._run = run

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """A row of the history."""
        self._run.log(values, step=step)

    def image(self, step: int, name: str, content: bytes) -> None:
        """An image."""
        import io

        from PIL import Image

        with Image.open(io.BytesIO(content)) as image:
            self._run.log({name: wandb.Image(image.convert("RGB"))}, step=step)

    def video(self, step: int, name: str, path: Path) -> None:
        """A video."""
        self._run.log({name: wandb.Video(str(path))}, step=step)

    def table(self, step: int, name: str, table: ResultTable) -> None:
        """A table, whose cells are texts."""
        rows = [[cell_text(cell) for cell in row] for row in table.rows]
        self._run.log({name: wandb.Table(columns=list(table.columns), data=rows)}, step=step)

    def text(self, step: int, name: str, text: str) -> None:
        """A text as preformatted HTML."""
        import html

        self._run.log({name: wandb.Html(f"<pre>{html.escape(text)}</pre>", inject=True)}, step=step)

    def flush(self) -> None:
        """The library's own process has everything already."""

    def finish(self, *, failed: bool) -> None:
        """Finish the run, which waits for uploads."""
        self._run.finish(exit_code=int(failed))
