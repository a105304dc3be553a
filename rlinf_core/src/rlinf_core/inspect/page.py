"""Render the page: one self-contained HTML file, with PNGs of its images and plots beside it."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rlinf_core.config.load import dump_config
from rlinf_core.data.statistics.diagnose import normalized_extremes, share_beyond
from rlinf_core.errors import UserError
from rlinf_core.files import check_writable, writing
from rlinf_core.illustration import Camera, Grid, Illustration, Picture
from rlinf_core.inspect.plots import MOST_PANELS, plot_chunk, plot_distribution, plot_lengths
from rlinf_core.inspect.samples import SampleView
from rlinf_core.inspect.views import RunView, SourceView
from rlinf_core.pages.one_file import templates
from rlinf_core.plots.figures import Plot
from rlinf_core.untrusted.text import read_json, shortened, without_controls

PAGE, MARKER = "index.html", ".rlinf_inspect.json"
NAME_OUTPUT = "Name another folder with --output"
MOST_TASKS, MOST_TOKENS = 40, 600
WIDEST = 320
"""Maximum width of an image on the page in pixels; `pictures/` has larger ones in full size."""
COLORS = 6
"""Number of colours for kinds of tokens and for values in a grid, as in the style sheet."""


@dataclass
class Files:
    """PNGs beside the page: path -> content."""

    found: dict[str, bytes] = field(default_factory=dict)

    def picture(self, name: str, picture: Picture) -> str:
        """Add an image. Returns the data URL of the version on the page."""
        from markupsafe import Markup
        from PIL import Image

        image = Image.fromarray(picture.pixels)
        self.found[f"pictures/{name}.png"] = _png(image)
        if image.width > WIDEST:
            image = image.resize((WIDEST, round(image.height * WIDEST / image.width)), Image.Resampling.LANCZOS)
        return Markup("data:image/png;base64," + base64.b64encode(_png(image)).decode())

    def plot(self, plot: Plot) -> Any:
        """Add a plot. Returns its SVG, marked as safe from autoescaping."""
        from markupsafe import Markup

        self.found[f"plots/{plot.name}.png"] = plot.png
        return Markup(plot.svg)


def render(view: RunView, config: str) -> tuple[str, Mapping[str, bytes]]:
    """The page, and the files beside it.

    Args:
        view: The contents of the page.
        config: The config's path and overrides, as given.
    """
    from markupsafe import escape

    files = Files()
    environment = templates(Path(__file__).parent, finalize=_finalize)
    environment.filters |= {"number": _number, "grid": _grid, "indexed": enumerate}
    html = environment.get_template("page.html").render(
        view=view,
        config=config,
        resolved=escape(dump_config(view.run)),
        sources=[_source(number, source, files) for number, source in enumerate(view.sources)],
        most_tokens=MOST_TOKENS,
        colors=COLORS,
    )
    return without_controls(html), files.found


def write(folder: Path, html: str, files: Mapping[str, bytes]) -> Path:
    """Write page and files to a temporary folder, then replace an earlier page with it. Returns the page's path.

    `MARKER` lists the files with their digests: only a folder that holds these alone is ever replaced.

    Raises:
        UserError: The folder has other files, or cannot be written.
    """
    check_folder(folder)
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    contents = {PAGE: html.encode(), **files}
    marker = {"written_by": "rlinf inspect", "sha256": {name: _digest(content) for name, content in contents.items()}}
    with writing(folder, NAME_OUTPUT):
        for name, content in {**contents, MARKER: json.dumps(marker, indent=1).encode()}.items():
            path = temporary / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.replace(folder)
    return folder / PAGE


def check_folder(folder: Path) -> None:
    """Raise `UserError` unless the folder is writable and either missing, empty, or an earlier page."""
    check_writable(folder, NAME_OUTPUT)
    known = _known_files(folder / MARKER)
    others = sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.name != MARKER and not (path.is_dir() and not path.is_symlink()) and not _is_known(path, folder, known)
    )
    if others:
        raise UserError(
            f"{folder} contains other files besides an earlier page ({', '.join(others[:3])}), which would be removed: "
            "name another folder with --output, or remove them"
        )


def _known_files(marker: Path) -> Mapping[str, str]:
    """The files of an earlier page with their digests; none if there is no page, or an early version wrote it."""
    try:
        found = read_json(marker)["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}


def _is_known(path: Path, folder: Path, known: Mapping[str, str]) -> bool:
    expected = known.get(path.relative_to(folder).as_posix())
    return expected is not None and path.is_file() and _digest(path.read_bytes()) == expected


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@dataclass(frozen=True)
class DistributionPanel:
    """Plot and table of `state` or `actions`."""

    key: str
    plot: Any
    columns: list[str]
    rows: list[list[Any]]
    left_out: int
    """Number of dimensions that are not drawn."""


def _source(number: int, source: SourceView, files: Files) -> dict[str, Any]:
    """A dataset for the template."""
    prefix = f"{_file_name(source.name)}-" if source.name else ""
    lengths = None
    if len(source.lengths) and source.lengths.max() > 1:
        lengths = files.plot(plot_lengths(f"{prefix}lengths", source.lengths, source.held_out))
    return {
        "view": source,
        "anchor": f"source-{number}",
        "title": source.name or "Data",
        "lengths": lengths,
        "tasks": source.tasks[:MOST_TASKS],
        "more_tasks": len(source.tasks) - MOST_TASKS,
        "distributions": list(_distributions(prefix, source, files)),
        "samples": [_sample(f"{prefix}sample{i}", sample, files) for i, sample in enumerate(source.samples, start=1)],
    }


def _distributions(prefix: str, source: SourceView, files: Files) -> Iterator[DistributionPanel]:
    for key, data in source.distributions.items():
        stats, mode, width = source.stats.get(key), source.mode, len(data.running.low)
        plot = plot_distribution(f"{prefix}{key}", key, data, stats, mode)
        used = stats or data.stats
        values: dict[str, Sequence[Any]] = {
            name: getattr(used, name)[:width].tolist() for name in ("mean", "std", "q01", "q99")
        }
        values |= {"min": data.running.low.tolist(), "max": data.running.high.tolist()}
        if stats is not None and mode is not None:
            extremes = normalized_extremes(key, source.stats, data, mode)
            values |= {
                "beyond ±5": [f"{share:.2%}" for share in share_beyond(key, source.stats, data, mode)],
                "largest normalised": extremes.max(axis=0).tolist(),
                "in episode": data.episodes[extremes.argmax(axis=0)].tolist(),
            }
        if any(data.names):
            values = {"name": data.names} | values
        rows = [[number, *row] for number, row in enumerate(zip(*values.values(), strict=True))]
        yield DistributionPanel(key, files.plot(plot), [key, *values], rows, max(0, width - MOST_PANELS))


def _sample(name: str, sample: SampleView, files: Files) -> dict[str, Any]:
    """A row for the template."""
    cameras = []
    for camera in _merged(sample.cameras, sample.illustration):
        shown = [
            (picture.caption, files.picture(f"{name}-{_file_name(camera.name)}-{i}", picture))
            for i, picture in enumerate(camera.pictures)
        ]
        cameras.append({"name": camera.name, "note": camera.note, "pictures": shown})
    chunk = sample.chunk and files.plot(plot_chunk(f"{name}-actions", sample.chunk))
    return {"view": sample, "anchor": name, "cameras": cameras, "chunk": chunk}


def _merged(cameras: Sequence[Camera], illustration: Illustration) -> Iterator[Camera]:
    """Each camera with the data's images, then the policy's."""
    of_policy = {camera.name: camera for camera in illustration.cameras}
    of_data = {camera.name: camera for camera in cameras}
    for name in dict.fromkeys((*of_policy, *of_data)):
        parts = [part[name] for part in (of_data, of_policy) if name in part]
        pictures = tuple(picture for part in parts for picture in part.pictures)
        yield Camera(name, pictures, " ".join(part.note for part in parts if part.note))


def _png(image: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG", optimize=True)
    return out.getvalue()


def _file_name(text: str) -> str:
    """Text made safe for a file name; a digest keeps texts distinct that differ only in replaced characters."""
    plain = re.sub(r"[^A-Za-z0-9_]", "_", text)
    return plain if plain == text else f"{plain}_{hashlib.blake2b(text.encode(), digest_size=3).hexdigest()}"


def _finalize(value: Any) -> Any:
    """What the page shows of a value: texts of data may have megabytes; markup is the page's own."""
    return shortened(value) if isinstance(value, str) and not hasattr(value, "__html__") else value


def _number(value: Any) -> str:
    """A table cell."""
    if isinstance(value, float):
        return "none" if np.isnan(value) else f"{value:.4g}".replace("-", "\N{MINUS SIGN}")
    return str(value)


@dataclass(frozen=True)
class Block:
    """Equal neighbours in a row of a grid, in units of its cells."""

    x: int
    y: int
    width: int
    value: int


@dataclass(frozen=True)
class DrawnGrid:
    """A grid as rectangles."""

    blocks: list[Block]
    rows: int
    columns: int
    cell: tuple[int, int]
    """Pixels of a cell, width and height."""
    gap: float
    """Cells between two blocks."""
    legend: list[tuple[int, str]]
    """Value and name of each value that occurs."""


def _grid(grid: Grid) -> DrawnGrid:
    rows, columns = grid.values.shape
    width = int(np.clip(480 // columns, 2, 14 if rows > 1 else 60))
    single = width >= 8  # Smaller cells could not be distinguished.
    blocks = []
    for y, row in enumerate(grid.values.tolist()):
        starts = [0, *(x for x in range(1, columns) if single or row[x] != row[x - 1])]
        ends = [*starts[1:], columns]
        blocks += [Block(x, y, end - x, row[x]) for x, end in zip(starts, ends, strict=True)]
    height = int(np.clip(192 // rows, 3, min(width, 14))) if rows > 1 else 14
    legend = [(value, grid.names[value]) for value in np.unique(grid.values).tolist()]
    return DrawnGrid(blocks, rows, columns, (width, height), 1 / width if single else 0.0, legend)
