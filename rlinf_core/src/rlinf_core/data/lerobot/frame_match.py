"""Which frame of a video belongs to which row, and whether that can be shown before step 1.

A row's frame is the one nearest to the episode's `from_timestamp` plus the row's `timestamp`. This is right only if all
clocks agree: times that run on over episodes, starts that drift, a video with a frame less or at another rate give
wrong frames, each within half a frame of some time. So every file's frame count is compared with the rows that share
it, and every row's frame by time with its frame by number. Containers' headers are read (in threads, cached by size and
modification time); a video of variable rate is read whole, without decoding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rlinf_core.data.images.video_header import FrameTimes, VideoHeader, read_frame_times, read_video_header
from rlinf_core.data.lerobot.metadata import Metadata
from rlinf_core.data.lerobot.rows import Rows
from rlinf_core.errors import UserError

READERS = 8
"""Headers that are read in parallel."""
FASTER = 1.5
"""From this many frames per row on, the rows are taken to be thinned out, and only times can match them."""
SETTING = 'data.match_frames = "number"'

Match = Literal["time", "number", "time_unchecked"]
"""`LeRobotDatasetConfig.match_frames`."""


@dataclass(frozen=True, eq=False)
class VideoFile:
    """A video file and the episodes that share it, in the order of their start. Arrays are [episodes of the file]."""

    metadata: Metadata
    camera: str
    path: Path
    places: NDArray[np.int64]
    """Indices in the metadata's arrays; empty episodes are left out."""

    @property
    def starts(self) -> NDArray[np.float64]:
        """Seconds."""
        return self.metadata.video_starts[self.camera][self.places]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Frames of each episode, according to the metadata."""
        return self.metadata.lengths[self.places]

    @property
    def firsts(self) -> NDArray[np.int64]:
        """Number of the first frame of each episode, if the file holds these episodes' frames and no others."""
        firsts: NDArray[np.int64] = np.cumsum(self.lengths) - self.lengths
        return firsts


def video_files(metadata: Metadata, camera: str) -> dict[Path, VideoFile]:
    """The video files of a camera, with all episodes that share each."""
    order = np.lexsort((metadata.episodes, metadata.video_starts[camera]))
    held: dict[Path, list[int]] = {}
    for place in order[metadata.lengths[order] > 0].tolist():
        held.setdefault(metadata.video_files[camera][place], []).append(place)
    return {path: VideoFile(metadata, camera, path, np.array(places)) for path, places in held.items()}


@dataclass(frozen=True, eq=False)
class FrameGrid:
    """The times of a file's frames: evenly spaced, or (`times`) those of each frame."""

    count: int
    start: float
    rate: float
    """Frames per second; the average rate if it varies."""
    times: FrameTimes | None = None

    def seconds(self, numbers: NDArray[np.int64]) -> NDArray[np.float64]:
        """The times of some frames, by their number in the file."""
        return self.start + numbers / self.rate if self.times is None else self.times.seconds[numbers]

    def nearest(self, seconds: NDArray[np.float64]) -> NDArray[np.int64]:
        """The numbers of the frames nearest to some times; -1 for NaN."""
        if self.times is None:
            numbers = np.clip(np.rint((seconds - self.start) * self.rate), 0, self.count - 1)
        else:
            numbers = self.times.nearest(seconds)
        return np.where(np.isnan(seconds), -1, numbers).astype(np.int64)


def read_grid(path: Path) -> FrameGrid:
    """The frame times of a video file; raises `UserError` if it cannot be opened as a video."""
    header = read_video_header(path)
    if header.frames and (rate := _constant_rate(header)):
        return FrameGrid(header.frames, header.start, rate)
    times = read_frame_times(path)
    first, last, count = float(times.seconds[0]), float(times.seconds[-1]), len(times.seconds)
    return FrameGrid(count, first, (count - 1) / (last - first) if last > first else 1.0, times)


def _constant_rate(header: VideoHeader) -> float | None:
    """The rate of a file whose frames are evenly spaced to a tenth of a frame, else None."""
    base, average = header.base_rate, header.average_rate
    if not base or not average or header.frames * abs(average / base - 1) > 0.1:
        return None
    return average


@dataclass(frozen=True)
class Mismatch:
    """Why the frames of a file cannot be shown to be the right ones."""

    kind: Literal["damaged_video", "wrong_count", "wrong_timestamp"]
    path: Path
    message: str
    """Cause and way out, without the file."""
    episode: int | None = None
    """The first affected episode; None if it cannot be known."""
    frame: int | None = None


class FrameMatch:
    """The frames of a dataset's rows.

    Args:
        rows: The rows.
        cameras: Video columns.
        match: See `LeRobotDatasetConfig.match_frames`.
    """

    def __init__(self, rows: Rows, cameras: Iterable[str], match: Match = "time") -> None:
        self._rows, self._match, self._cameras = rows, match, tuple(cameras)
        starts, fps = rows.columns["timestamp"][rows.starts], rows.metadata.fps
        late = bool(len(starts)) and bool((np.abs(starts - 1 / fps) < 0.25 / fps).all())
        self.begins_late = late and all(self._is_alone(camera) for camera in self._cameras)
        """Whether the times of every episode begin at 1 / fps and its video has no other, as in GR00T's datasets."""
        self._firsts = {camera: self._first_frames(camera) for camera in self._cameras} if match == "number" else {}
        """Camera -> [episodes], the number of each episode's first frame in its file."""
        self._files: dict[str, dict[Path, VideoFile]] = {}

    @property
    def places(self) -> NDArray[np.int64]:
        """[E of the rows], the indices in the metadata's arrays of the episodes that were read."""
        return self._rows.places

    def _is_alone(self, camera: str) -> bool:
        paths = self._rows.metadata.video_files[camera]
        return len(set(paths)) == len(paths)

    def _first_frames(self, camera: str) -> NDArray[np.int64]:
        firsts = np.zeros(len(self._rows.metadata.episodes), np.int64)
        for file in video_files(self._rows.metadata, camera).values():
            firsts[file.places] = file.firsts
        return firsts

    def seconds(self, camera: str, path: Path, at: NDArray[np.int64]) -> NDArray[np.float64]:
        """The times to decode of rows whose frames are in one file.

        Args:
            camera: The column.
            path: The file.
            at: Positions of the rows.
        """
        rows, metadata = self._rows, self._rows.metadata
        place = rows.places[rows.episode_of(at)]
        if self._match == "number":
            frames = self._firsts[camera][place] + rows.columns["frame_index"][at].astype(np.int64)
            return read_grid(path).seconds(frames)
        seconds: NDArray[np.float64] = metadata.video_starts[camera][place] + rows.columns["timestamp"][at]
        if self.begins_late:  # The last row's time is that of the end of the last frame.
            grid = read_grid(path)
            seconds = np.minimum(seconds, grid.seconds(np.array([grid.count - 1])))
        return seconds

    def seconds_of_episode(self, camera: str, path: Path, episode: int) -> NDArray[np.float64]:
        """The times to decode of all rows of an episode, by the dataset's number of it."""
        rows = self._rows
        i = int(np.searchsorted(rows.metadata.episodes[rows.places], episode))
        return self.seconds(camera, path, np.arange(rows.starts[i], rows.stops[i]))

    def check_file(self, camera: str, path: Path) -> Mismatch | None:
        """What cannot be shown to be right in one file, for the episodes that were read."""
        if self._match == "time_unchecked":
            return None
        if camera not in self._files:
            self._files[camera] = video_files(self._rows.metadata, camera)
        return next(self._check(self._files[camera][path], set(self._rows.places.tolist())), None)

    def mismatches(self, used: NDArray[np.bool_]) -> list[Mismatch]:
        """What cannot be shown to be right, one per file at most; missing files are not reported.

        Args:
            used: [E of the rows], the episodes to check; files without one are not opened.
        """
        if self._match == "time_unchecked":
            return []
        wanted = set(self._rows.places[used].tolist())
        files = [
            file
            for camera in self._cameras
            for file in video_files(self._rows.metadata, camera).values()
            if not wanted.isdisjoint(file.places.tolist()) and file.path.is_file()
        ]
        with ThreadPoolExecutor(READERS) as pool:
            found = pool.map(lambda file: next(self._check(file, wanted), None), files)
            return [mismatch for mismatch in found if mismatch]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": {}}

    def _check(self, file: VideoFile, wanted: set[int]) -> Iterator[Mismatch]:
        """What is wrong with a file, the cause before its consequences."""
        try:
            grid = read_grid(file.path)
        except UserError as error:
            why = f"{str(error).removeprefix(f'{file.path} ')}. It has the frames of {_named(file)}"
            yield Mismatch("damaged_video", file.path, why)
            return
        total, numbers = int(file.lengths.sum()), [n for n, p in enumerate(file.places.tolist()) if p in wanted]
        thinned = grid.rate >= FASTER * file.metadata.fps and grid.count > total
        if self._match == "number":
            if grid.count != total:
                yield Mismatch("wrong_count", file.path, _counted(file, grid, self._match))
            return
        if grid.count == total and not self.begins_late and self._all_match(file, grid, numbers):
            return
        yield from (wrong for n in numbers if (wrong := self._check_start(file, grid, n)))
        if grid.count < total:
            yield Mismatch("wrong_count", file.path, _counted(file, grid, self._match))
        if grid.count > total and len(file.places) > 1 and not thinned and (why := _spare(file, grid)):
            yield Mismatch("wrong_count", file.path, why)
        yield from (wrong for n in numbers if (wrong := self._check_episode(file, grid, n, thinned=thinned)))

    def _all_match(self, file: VideoFile, grid: FrameGrid, numbers: Sequence[int]) -> bool:
        """Whether every row's frame by time is the one of its number, in a file with one frame per row."""
        chosen = np.array(numbers)
        i = np.searchsorted(self._rows.places, file.places[chosen])
        lengths = file.lengths[chosen]
        frames = np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        times = self._rows.columns["timestamp"][np.repeat(self._rows.starts[i], lengths) + frames].astype(np.float64)
        by_time = grid.nearest(np.repeat(file.starts[chosen], lengths) + times)
        begin = times[frames == 0] < 0.5 / file.metadata.fps
        return bool((by_time == np.repeat(file.firsts[chosen], lengths) + frames).all() and begin.all())

    def _times(self, place: int) -> NDArray[np.float64]:
        """The times of an episode's rows, in seconds."""
        i = int(np.searchsorted(self._rows.places, place))
        return self._rows.columns["timestamp"][self._rows.starts[i] : self._rows.stops[i]].astype(np.float64)

    def _check_start(self, file: VideoFile, grid: FrameGrid, number: int) -> Mismatch | None:
        """Check that the times of an episode begin with the episode."""
        times, fps = self._times(int(file.places[number])), file.metadata.fps
        if times[0] < (1.5 if self.begins_late else 0.5) / fps:
            return None
        episode = int(file.metadata.episodes[file.places[number]])
        what = (
            f"the timestamp of the first row of episode {episode} is {times[0]:.4f} s instead of 0: times run on over "
            f"episodes, and rows would get frames of other episodes. {self._way_out(file, grid)}"
        )
        return Mismatch("wrong_timestamp", file.path, what, episode, 0)

    def _way_out(self, file: VideoFile, grid: FrameGrid) -> str:
        if grid.count == int(file.lengths.sum()):
            return (
                f"The file has exactly one frame per row: {SETTING} gives each row the frame of its number, whatever "
                "the times are"
            )
        return "Convert the dataset again, or leave the episode out (data.exclude_episodes)"

    def _check_episode(self, file: VideoFile, grid: FrameGrid, number: int, *, thinned: bool) -> Mismatch | None:
        """Compare the frames by time with the frames by number of one episode."""
        place, start, fps = int(file.places[number]), float(file.starts[number]), file.metadata.fps
        times = self._times(place)
        by_time, frames = grid.nearest(start + times), np.arange(len(times))
        if thinned:
            far = np.abs(grid.seconds(by_time) - start - times) > 0.5 / fps
            wrong = far | (np.diff(by_time, prepend=by_time[0] - 1) <= 0)
        else:
            exact = grid.count == int(file.lengths.sum())
            expected = frames + (file.firsts[number] if exact else grid.nearest(np.array([start]))[0])
            if self.begins_late:
                expected = np.minimum(expected + 1, grid.count - 1)
            wrong = by_time != expected
        if not wrong.any():
            return None
        return self._explain(file, grid, number, times, int(wrong.argmax()), int(wrong.sum()))

    def _explain(
        self, file: VideoFile, grid: FrameGrid, number: int, times: NDArray[np.float64], frame: int, count: int
    ) -> Mismatch:
        fps, episode = file.metadata.fps, int(file.metadata.episodes[file.places[number]])
        first = file.firsts[number : number + 1]
        off = float((file.starts[number] - grid.seconds(first)[0]) * grid.rate)
        exact = grid.count == int(file.lengths.sum())
        if exact and abs(off) >= 0.4:
            cause = (
                f"its from_timestamp, {file.starts[number]:.4f} s, is {abs(off):.2f} frames "
                f"{'late' if off > 0 else 'early'}: by the lengths of the episodes before it, it starts at "
                f"{grid.seconds(first)[0]:.4f} s, with frame {first[0]} of the file"
            )
        elif abs(grid.rate / fps - 1) > 1e-4 and grid.times is None:
            cause = f"the video has {grid.rate:.6g} frames per second, the rows {fps:.6g}: they drift apart"
        else:
            cause = (
                f"the timestamp of row {frame}, {times[frame]:.4f} s, plus from_timestamp is nearest to another frame "
                "than that of its number"
            )
        rows = f"{count} of {len(times)} rows of episode {episode}"
        what = f"{rows} would get a wrong frame: {cause}. {self._way_out(file, grid)}"
        return Mismatch("wrong_timestamp", file.path, what, episode, frame)


def _named(file: VideoFile) -> str:
    numbers = file.metadata.episodes[file.places].tolist()
    if len(numbers) == 1:
        return f"episode {numbers[0]}"
    return f"episodes {min(numbers)} to {max(numbers)}" if len(numbers) > 2 else f"episodes {numbers[0]}, {numbers[1]}"


def _counted(file: VideoFile, grid: FrameGrid, match: Match) -> str:
    """The message for a file with fewer frames than rows or (by number) another count."""
    total, numbers = int(file.lengths.sum()), file.metadata.episodes[file.places].tolist()
    what = f"has {grid.count} frames, but {_named(file)} ha{'s' if len(numbers) == 1 else 've'} {total} rows"
    if len(numbers) == 1 and grid.count < total:
        what += f": rows from frame {grid.count} on have none"
    if match == "number" and grid.count > total:
        return f"{what}: {SETTING} needs one frame per row. Leave it out, so that frames are matched by time"
    if len(numbers) > 1:
        what += (
            ". Which episode lacks frames cannot be known from the counts, and every row after the gap would get a "
            "later frame"
        )
    return (
        f"{what}. Convert or record these episodes again, or leave them out: "
        f"data.exclude_episodes = [{_ranges(numbers)}]"
    )


def _spare(file: VideoFile, grid: FrameGrid) -> str:
    """Why the frames beyond the rows' cannot be placed; empty if from_timestamps leave room for all of them."""
    first = grid.nearest(file.starts)
    room = np.diff(first, append=grid.count) - file.lengths
    spare, explained = grid.count - int(file.lengths.sum()), int(room[:-1].sum())
    if (room[:-1] >= 0).all() and room[-1] == 0 and explained + first[0] == spare:
        return ""
    if (room < 0).any():
        return ""  # Episodes overlap, which is reported with both.
    return (
        f"has {grid.count} frames, but {_named(file)} have {grid.count - spare} rows, and their from_timestamps leave "
        f"no room for {int(room[-1])} of the others: if they are between episodes, every row after them would get an "
        "earlier frame. Convert these episodes again, or leave them out: data.exclude_episodes = "
        f"[{_ranges(file.metadata.episodes[file.places].tolist())}]; if they are all at the end of the file, "
        'data.match_frames = "time_unchecked" uses the times as they are'
    )


def _ranges(numbers: Sequence[int]) -> str:
    """`1, "3-7"`, as `data.exclude_episodes` takes it."""
    parts: list[tuple[int, int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][1] + 1:
            parts[-1] = (parts[-1][0], number)
        else:
            parts.append((number, number))
    return ", ".join(str(first) if first == last else f'"{first}-{last}"' for first, last in parts)
