"""`open_rows` and `open_samples`: the rows of a run, and what its policy gets of them, as sequences for notebooks.

Both open data as the run does, but save nothing and leave the run's folder alone. Torch stays unloaded unless the
dataset's reader or its video decoder needs it (torchcodec does, PyAV does not).
"""

from __future__ import annotations

import operator
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self, overload, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from rlinf_core.config.load import load_config, with_begun
from rlinf_core.contract.datasets import SampleSource, Split
from rlinf_core.contract.run import RunConfig, RunSource, no_source
from rlinf_core.data.loading.encoding import encode_rows, read_rows
from rlinf_core.data.pipeline import Pipeline
from rlinf_core.data.sample import Row, Sample
from rlinf_core.data.splits import open_split
from rlinf_core.data.statistics.preview import bind_policy
from rlinf_core.data.statistics.run import diagnosed_pipeline
from rlinf_core.errors import UserError
from rlinf_core.plugins.registry import Plugins, get_plugins


@runtime_checkable
class _Closable(Protocol):
    """A source that can close its files; it opens them again when it is read."""

    def close(self) -> None: ...


@dataclass
class _Opened:
    """A source that a sequence and its views share; None once it is closed."""

    source: SampleSource | None

    def read(self) -> SampleSource:
        if self.source is None:
            raise UserError("the data are closed: read them inside the `with` block, or open them again")
        return self.source

    def close(self) -> None:
        if isinstance(self.source, _Closable):
            self.source.close()
        self.source = None


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class OpenedSequence[T](Sequence[T]):
    """Items of one split that are read when they are accessed; `Rows` and `Samples` say what an item is.

    Integers (negative and NumPy ones, too) index it like a list. A slice is a view: it reads nothing and shares the
    files. A `DataLoader` reads a batch at a time, and copies in its workers open their own files. `close`, or leaving a
    `with` block, closes the files of all views.
    """

    run: RunConfig
    """The run, with the dataset of these items as its `data`."""
    split: Split
    """`"train"` or `"validation"`."""
    _opened: _Opened
    _at: range
    """The rows of the split that are in this view."""
    _images: bool = True

    def __len__(self) -> int:
        return len(self._at)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Self: ...
    def __getitem__(self, index: int | slice) -> T | Self:
        if isinstance(index, slice):
            return replace(self, _at=self._at[index])
        (item,) = self.__getitems__([index])
        return item

    def __getitems__(self, indices: Sequence[int]) -> list[T]:
        """Several items in one pass over the files; the method that a `DataLoader` looks for."""
        source, at = self._opened.read(), [self._at[self._checked(index)] for index in indices]
        rows = read_rows(source, at) if self._images else source.without_images(at)
        return self._made(source, at, rows)

    def _made(self, source: SampleSource, at: Sequence[int], rows: list[Row]) -> list[T]:
        raise NotImplementedError

    def without_images(self) -> Self:
        """A view of the same items without their images: nothing is decoded, so that reading is fast."""
        return replace(self, _images=False)

    @property
    def episodes(self) -> NDArray[np.int64]:
        """[N], the dataset's own episode number of each item; reads no items."""
        return self._opened.read().episodes[np.asarray(self._at, np.int64)]

    def close(self) -> None:
        """Close the files; all views are closed as well."""
        self._opened.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        name = self.run.data.repo_id or self.run.data.config_name
        return f"<{type(self).__name__}: {len(self)} of {name}, {self.split}>"

    def _checked(self, index: Any) -> int:
        """The index as an integer; raises what a list raises."""
        try:
            number = operator.index(index)
        except TypeError as error:
            raise TypeError(f"indices are integers or slices, not {index!r} (a column is in an item)") from error
        if not -len(self) <= number < len(self):
            there = f"has indices 0 to {len(self) - 1}" if len(self) else "is empty"
            raise IndexError(f"index {number} is out of range: {self!r} {there}")
        return number


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Rows(OpenedSequence[Row]):
    """The rows of one split, under the dataset's own column names; see `data.sample.Row`."""

    def _made(self, source: SampleSource, at: Sequence[int], rows: list[Row]) -> list[Row]:
        return rows


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Samples(OpenedSequence[Sample]):
    """The samples of one split: what `Pipeline.encode` makes of its rows, without random draws.

    Noise and augmentation belong to a step that uses a row, not to the row; `run.policy.draw` makes them.
    """

    pipeline: Pipeline
    """Encodes the rows; `pipeline.decode(sample["actions"], sample)` goes back to the data's units."""
    warnings: tuple[str, ...]
    """What a run would report about its statistics when it starts."""

    def _made(self, source: SampleSource, at: Sequence[int], rows: list[Row]) -> list[Sample]:
        return encode_rows(source, at, rows, self.pipeline)


def open_rows(
    config: str | os.PathLike[str] | RunConfig,
    *overrides: str,
    split: Split = "train",
    source: str = "",
    plugins: Plugins | None = None,
) -> Rows:
    """Open the rows of a run's dataset, before any transform.

    A row has the columns that the config names, with the action chunk of its frame, and `task`, `episode_index` and
    `frame_index`; images are uint8 [height, width, 3].

    Args:
        config: The run's TOML file, or a loaded config.
        overrides: `section.key=value`, which override the file: `"data.episodes=[7]"`.
        split: `"train"`, or `"validation"` for the held-out episodes.
        source: For a mixture, the name of the dataset.
        plugins: Plugins that provide the classes and the reader; default: those of the environment.

    Raises:
        UserError: The config is not valid, or the split cannot be opened; the message says how to fix it.
    """
    plugins = plugins or get_plugins()
    given = _choose(_load(config, overrides, plugins), source)
    with given.naming():
        rows = open_split(given.run, plugins, split)
    return Rows(run=given.run, split=split, _opened=_Opened(rows), _at=range(len(rows)))


def open_samples(
    config: str | os.PathLike[str] | RunConfig,
    *overrides: str,
    split: Split = "train",
    source: str = "",
    plugins: Plugins | None = None,
) -> Samples:
    """Open the encoded samples of a run's dataset: what its policy gets, without random draws.

    Statistics are those that a new run would begin with: given by `data.norm_stats`, or computed from all training
    rows, which takes as long as `rlinf norm-stats`; they are diagnosed, and not saved.

    Args:
        config: The run's TOML file, or a loaded config.
        overrides: `section.key=value`, which override the file.
        split: `"train"`, or `"validation"` for the held-out episodes.
        source: For a mixture, the name of the dataset.
        plugins: Plugins that provide the classes and the reader; default: those of the environment.

    Raises:
        UserError: As for `open_rows`; or the statistics would spoil the run.
    """
    plugins = plugins or get_plugins()
    run = _load(config, overrides, plugins)
    _choose(run, source)  # A wrong name is reported before any data are read.
    given = _choose(bind_policy(run, plugins)[0], source)
    with given.naming():
        rows = open_split(given.run, plugins, split)
        train = rows if split == "train" else open_split(given.run, plugins, "train")
        pipeline, diagnosis = diagnosed_pipeline(given.run, train, computed=given.run.folder / given.statistics)
        if diagnosis:
            diagnosis.refuse()
    return Samples(
        run=given.run,
        split=split,
        pipeline=pipeline,
        warnings=tuple(map(str, diagnosis.findings)) if diagnosis else (),
        _opened=_Opened(rows),
        _at=range(len(rows)),
    )


def _load(config: str | os.PathLike[str] | RunConfig, overrides: Sequence[str], plugins: Plugins) -> RunConfig:
    if not isinstance(config, RunConfig):
        return with_begun(load_config(config, overrides, plugins))
    if overrides:
        raise UserError(f"{overrides[0]!r} cannot override a loaded config: pass the TOML file instead")
    return config


def _choose(run: RunConfig, name: str) -> RunSource:
    names = [known.name for known in run.sources if known.name]
    if (name or len(names) > 1) and name not in names:
        raise UserError(no_source(name, names, "with source=..."))
    return run.source(name)
