"""TensorBoard's event files, written with its own writer and messages; neither TensorFlow nor torch is loaded."""

from __future__ import annotations

import io
import math
import time
from pathlib import Path
from typing import Any

from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from rlinf_core.results import ResultTable, as_markdown
from rlinf_plugins_trackers.config import TensorBoardConfig
from rlinf_plugins_trackers.memory import Job, Memory
from rlinf_plugins_trackers.sinks.animation import as_gif

SECONDS_BETWEEN_FLUSHES = 10


def open_sink(config: TensorBoardConfig, job: Job, memory: Memory) -> TensorBoardSink:
    """A new event file; TensorBoard drops steps of earlier ones that this run repeats."""
    folder = Path(config.dir) if config.dir else Path(job.folder) / "tensorboard"
    sink = TensorBoardSink(EventFileWriter(str(folder), flush_secs=SECONDS_BETWEEN_FLUSHES))
    sink.start(job.start_step + 1)
    return sink


class TensorBoardSink:
    """A folder of event files."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def start(self, step: int) -> None:
        """Mark what was logged before from this step on as void."""
        self._writer.add_event(Event(wall_time=time.time(), step=step, session_log=SessionLog(status=SessionLog.START)))

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Scalars; TensorBoard draws NaN as a triangle."""
        self._add(step, [Summary.Value(tag=name, simple_value=_in_range(value)) for name, value in values.items()])

    def image(self, step: int, name: str, content: bytes) -> None:
        """An image."""
        with Image.open(io.BytesIO(content)) as image:
            width, height = image.size
        self._image(step, name, content, height, width)

    def video(self, step: int, name: str, path: Path) -> None:
        """A video as a GIF, which TensorBoard shows among the images."""
        self._image(step, name, *as_gif(path))

    def table(self, step: int, name: str, table: ResultTable) -> None:
        """A table as Markdown."""
        self.text(step, name, as_markdown(table))

    def text(self, step: int, name: str, text: str) -> None:
        """A text."""
        metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
        shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)])
        tensor = TensorProto(dtype="DT_STRING", string_val=[text.encode()], tensor_shape=shape)
        self._add(step, [Summary.Value(tag=f"{name}/text_summary", metadata=metadata, tensor=tensor)])

    def flush(self) -> None:
        """Write what is buffered."""
        self._writer.flush()

    def finish(self, *, failed: bool) -> None:
        """Close the file."""
        self._writer.close()

    def _image(self, step: int, name: str, content: bytes, height: int, width: int) -> None:
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=content)
        self._add(step, [Summary.Value(tag=name, image=image)])

    def _add(self, step: int, values: list[Any]) -> None:
        self._writer.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))


def _in_range(value: float) -> float:
    """A number as float32 can hold it."""
    return value if abs(value) < 3.4e38 or not math.isfinite(value) else math.copysign(math.inf, value)
