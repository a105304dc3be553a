"""`rlinf cache`: frames are decoded once, and a run rejects a cache that does not fit."""

import json
import os
import pickle
import re
import shutil
import signal
from argparse import Namespace
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
from distributions import repository_plugins
from toy_data import ToyPolicy

from rlinf_core import UserError, open_rows
from rlinf_core.cli import main
from rlinf_core.commands import cache
from rlinf_core.config.load import load_config
from rlinf_core.contract.datasets import ColumnSource, LeRobotDatasetConfig
from rlinf_core.data.frame_cache import source as frame_cache
from rlinf_core.data.frame_cache import writer as frame_cache_writing
from rlinf_core.data.frame_cache.manifest import POSITIONS, caches_of, plain, read_manifest, resizing_to_keep
from rlinf_core.data.frame_cache.parts import Conversion
from rlinf_core.data.frame_cache.source import CachedSource, open_cached
from rlinf_core.data.frame_cache.writer import check_room, convert, find_missing, lock
from rlinf_core.data.lerobot.source import open_lerobot
from rlinf_core.data.splits import open_split
from rlinf_core.data.transforms import Transform
from rlinf_core.preflight import check_run
from rlinf_core.testing.lerobot import CAMERAS, SIZE

FRAME = SIZE * SIZE * 3


def config(root, **fields):
    known = {"repo_id": str(root), "images": {"base": CAMERAS[0], "wrist": CAMERAS[1]}, "validation_episodes": (1,)}
    return LeRobotDatasetConfig(**known | fields)


def conversion(data, base, policy=None, *, form="raw", parts=FRAME * 10, quality=95):
    splits = tuple(open_lerobot(data, 0, split) for split in ("train", "validation"))
    caches = caches_of(splits[0].metadata, data, policy or ToyPolicy(), form, quality=quality, above=str(base))
    return Conversion(caches, splits, parts)


def make(data, base, policy=None, **options):
    """A whole cache, and the config that uses it."""
    work = conversion(data, base, policy, **options)
    convert(work, find_missing(work), workers=0, progress=lambda done, all: None)
    use = {"cache": options.get("form", "raw"), "cache_dir": str(base), "cache_quality": options.get("quality", 95)}
    return work, data.model_copy(update=use)


def cached(data, policy=None, split="train"):
    return open_cached(open_lerobot(data, 0, split), data, policy or ToyPolicy())


def same_rows(ours, theirs):
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():
            np.testing.assert_array_equal(value, other[key])


@pytest.mark.parametrize("kind", ["video_dataset", "image_dataset"])
def test_raw_frames_are_those_that_are_decoded(kind, request, tmp_path):
    data = config(request.getfixturevalue(kind).root)
    work, with_cache = make(data, tmp_path)
    assert len(work.parts) == 4
    for split in ("train", "validation"):
        ours, theirs = cached(with_cache, split=split), open_lerobot(data, 0, split)
        order = np.random.default_rng(0).permutation(len(theirs)).tolist()
        same_rows(ours.__getitems__(order), theirs.__getitems__(order))
        assert ours.fingerprint() == theirs.fingerprint()
        assert ours.describe(3) == theirs.describe(3)
        np.testing.assert_array_equal(ours.episodes, theirs.episodes)
    assert isinstance(ours, ColumnSource)
    same_rows(pickle.loads(pickle.dumps(ours)).__getitems__([2]), theirs.__getitems__([2]))
    frame = ours.__getitems__([0])[0][CAMERAS[0]]
    assert frame.base is not None  # A view of the file: nothing is copied before the batch is made ...
    assert not frame.flags.writeable  # ... and nothing can be written to it.


def test_jpeg_frames_are_off_by_what_was_said(video_dataset, tmp_path):
    data = config(video_dataset.root)
    decoded = np.stack([row[CAMERAS[0]].astype(int) for row in open_lerobot(data, 0, "train").__getitems__(range(24))])
    means, made = [], []
    for quality in (80, 95):
        work, with_cache = make(data, tmp_path, form="jpeg", quality=quality)
        manifest = read_manifest(work.cache.manifest(CAMERAS[0]))
        off = np.abs(np.stack([row[CAMERAS[0]] for row in cached(with_cache).__getitems__(range(24))]) - decoded)
        assert 0 < off.max() <= manifest.largest_loss  # All 36 frames were sampled.
        assert off.mean() == pytest.approx(manifest.mean_loss, rel=0.2)
        means.append(off.mean())
        made.append(with_cache)
    assert means[1] < means[0]
    again = np.stack([row[CAMERAS[0]] for row in cached(made[0]).__getitems__(range(24))])
    assert np.abs(again - decoded).mean() == means[0]  # Another quality does not change what a run has begun on.
    with pytest.raises(UserError, match=r"it has caches as jpeg80, jpeg95 \(data.cache, data.cache_quality\)"):
        cached(made[0].model_copy(update={"cache_quality": 90}))


@dataclass(frozen=True)
class Halve(Transform):
    resizes: ClassVar[bool] = True

    def __call__(self, sample):
        if "images" not in sample:
            return sample
        images = {name: image[::2, ::2] if len(image) == SIZE else image for name, image in sample["images"].items()}
        return {**sample, "images": images}


class Resizing(ToyPolicy):
    def transforms(self):
        return (Halve(), *super().transforms())


@dataclass(frozen=True)
class Flip(Transform):
    def __call__(self, sample):
        return {**sample, "images": {name: image[::-1] for name, image in sample["images"].items()}}


class Flipping(LeRobotDatasetConfig):
    def transforms(self):
        return (Flip(),)


def test_what_the_policy_resizes_first_is_kept_resized(video_dataset, tmp_path):
    data = config(video_dataset.root)
    work, with_cache = make(data, tmp_path, Resizing())
    assert work.sampled[CAMERAS[0]].size == (SIZE // 2, SIZE // 2)
    ours, theirs = (
        cached(with_cache, Resizing()).__getitems__([0, 9]),
        open_lerobot(data, 0, "train").__getitems__([0, 9]),
    )
    for one, other in zip(ours, theirs, strict=True):
        assert one[CAMERAS[0]].shape == (SIZE // 2, SIZE // 2, 3)
        sample = Halve()({"images": {"a": one[CAMERAS[1]]}}), Halve()({"images": {"a": other[CAMERAS[1]]}})
        np.testing.assert_array_equal(sample[0]["images"]["a"], sample[1]["images"]["a"])
    with pytest.raises(UserError, match="there is no cache"):
        cached(with_cache)  # Another policy needs the dataset's own size.


def test_what_changes_before_resizing_is_kept_as_it_is(video_dataset):
    metadata = open_lerobot(config(video_dataset.root), 0, "train").metadata
    fields = config(video_dataset.root).model_dump()
    assert resizing_to_keep(metadata, config(video_dataset.root), Resizing()) == Halve()
    assert resizing_to_keep(metadata, config(video_dataset.root), ToyPolicy()) is None
    assert resizing_to_keep(metadata, Flipping(**fields), Resizing()) is None
    crop = {"base": {"height": 8, "width": 8}}
    assert resizing_to_keep(metadata, config(video_dataset.root, crops=crop), Resizing()) is None
    assert resizing_to_keep(metadata, config(video_dataset.root, stats_need_images=True), Resizing()) is None


def test_an_interrupted_conversion_goes_on_where_it_was(video_dataset, tmp_path):
    data = config(video_dataset.root)
    work, with_cache = conversion(data, tmp_path), config(video_dataset.root, cache="raw", cache_dir=str(tmp_path))

    def stop(done, all):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(work, find_missing(work), workers=0, progress=stop)
    with pytest.raises(UserError, match=r"is not complete .* run `rlinf cache` with this config and --format raw"):
        cached(with_cache)
    kept = {path: path.stat().st_mtime_ns for path in work.cache.folder.glob("*.raw")}
    assert len(kept) == 4
    again = conversion(data, tmp_path)
    missing = find_missing(again)
    assert list(missing) == [2, 3]
    convert(again, missing, workers=0, progress=lambda done, all: None)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    same_rows(cached(with_cache).__getitems__(range(29)), open_lerobot(data, 0, "train").__getitems__(range(29)))


@pytest.mark.slow
def test_worker_processes_make_the_same_files(video_dataset, tmp_path):
    data = config(video_dataset.root)
    one, _ = make(data, tmp_path / "one")
    two = conversion(data, tmp_path / "two")
    convert(two, find_missing(two), workers=2, progress=lambda done, all: None)
    ours, theirs = (sorted(work.cache.folder.glob("*[0-9].*")) for work in (one, two))
    assert [path.read_bytes() for path in ours] == [path.read_bytes() for path in theirs]


def test_a_worker_hears_the_pool_also_from_a_server_that_a_loader_has_started(video_dataset, tmp_path):
    work = conversion(config(video_dataset.root), tmp_path)
    interrupt = signal.getsignal(signal.SIGINT)
    signals = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        frame_cache_writing._become_worker(work)
        assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, signals)
        signal.signal(signal.SIGINT, interrupt)
        frame_cache_writing._conversion.clear()


def test_a_damaged_part_is_found_and_mended(video_dataset, tmp_path):
    data = config(video_dataset.root)
    work, with_cache = make(data, tmp_path)
    part = work.file(CAMERAS[1], 1)
    whole = part.read_bytes()
    damage(part)
    assert find_missing(work) == {1: [CAMERAS[1]]}
    part.write_bytes(whole[:-1])
    with pytest.raises(UserError, match=f"lacks {part.name}, or a part of it"):
        cached(with_cache)
    convert(work, find_missing(work), workers=0, progress=lambda done, all: None)
    assert part.read_bytes() == whole
    cached(with_cache)


def test_a_cache_of_other_data_is_refused(video_dataset, tmp_path):
    root = shutil.copytree(video_dataset.root, tmp_path / "data")
    _, with_cache = make(config(root, episodes=(0, 1, 2)), tmp_path / "cache")
    cached(with_cache)
    cached(with_cache.model_copy(update={"validation_episodes": (2,)}))  # Held out or not, they are all in it.
    with pytest.raises(UserError, match="is of other"):
        cached(with_cache.model_copy(update={"episodes": (0, 1, 3)}))
    moved = shutil.copytree(root, tmp_path / "of another name")
    cached(with_cache.model_copy(update={"repo_id": str(moved)}))  # A copy of the data is the same data.
    video = sorted(root.glob("videos/**/*.mp4"))[0]
    video.write_bytes(video.read_bytes() + b"\0")
    with pytest.raises(UserError, match=rf"is of other data: {video.relative_to(root)} had \d+ bytes and now has \d+"):
        cached(with_cache)


def test_videos_of_the_same_size_with_other_content_are_noticed(video_dataset, tmp_path):
    root = shutil.copytree(video_dataset.root, tmp_path / "data")
    _, with_cache = make(config(root), tmp_path / "cache")
    video = sorted(root.glob("videos/**/*.mp4"))[0]
    content = bytearray(video.read_bytes())
    content[-5] ^= 1
    os.utime(video, (0, 0))
    cached(with_cache)
    video.write_bytes(content)
    with pytest.raises(UserError, match=rf"{video.relative_to(root)} had the same size, but other content"):
        cached(with_cache)


def test_a_part_that_rots_is_noticed_at_the_start(video_dataset, tmp_path):
    work, with_cache = make(config(video_dataset.root), tmp_path)
    part = work.file(CAMERAS[0], 2)
    part.write_bytes(bytes(part.stat().st_size))
    with pytest.raises(UserError, match=rf"is damaged: {part.name} has changed since it was written.*rlinf cache"):
        cached(with_cache)


def test_a_cache_of_an_early_version_is_used(video_dataset, tmp_path):
    work, with_cache = make(config(video_dataset.root), tmp_path)
    for column in CAMERAS:
        path = work.cache.manifest(column)
        table = json.loads(path.read_text())
        del table["evidence"]
        for part in table["parts"]:
            del part["evidence"]
        path.write_text(json.dumps(table))
    cached(with_cache)


def test_a_damaged_list_of_positions_is_one_message(video_dataset, tmp_path):
    work, with_cache = make(config(video_dataset.root), tmp_path)
    (work.cache.folder / POSITIONS).write_bytes(b"")
    with pytest.raises(UserError, match=r"positions.npy is damaged .*run `rlinf cache` again"):
        cached(with_cache)


def test_names_that_differ_have_files_that_differ():
    names = ["cam left", "cam-left", "cam/left", "observation.images.front", "käm", "kam", "k-m"]
    assert len({plain(name) for name in names}) == len(names)
    assert plain("observation.images.front") == "observation.images.front"
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+", plain(name)) for name in names)


def test_room_is_asked_for_before_the_work(video_dataset, tmp_path, monkeypatch):
    work = conversion(config(video_dataset.root), tmp_path)
    missing = find_missing(work)
    needed, _ = check_room(work, missing)
    assert 36 * 2 * FRAME < needed < 36 * 2 * FRAME * 1.1
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(frame_cache_writing.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"needs 0.000226 GB more, but 1e-06 GB are free: make room, use --format jpeg"):
        check_room(work, missing)
    assert not work.cache.folder.exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is not a folder"):
        check_room(conversion(config(video_dataset.root), tmp_path / "file"), missing)


def test_two_commands_do_not_write_one_cache(tmp_path):
    with lock(tmp_path), pytest.raises(UserError, match="is being written by another process"), lock(tmp_path):
        pass


def test_the_command_makes_what_a_run_uses(tmp_path, monkeypatch, capsys):
    quickstart = "examples/quickstart.toml"
    few = ["data.episodes=[0, 1, 2]", "data.validation_fraction=0", "runner.val_check_interval=0"]
    use = [*few, "data.cache=raw", f"data.cache_dir={tmp_path}"]
    plugins = repository_plugins()
    run = load_config(quickstart, use, plugins)
    with pytest.raises(UserError, match=r"there is no cache of examples/data/metaworld_3tasks in"):
        open_split(run, plugins, "train")
    command = ["cache", quickstart, *few, "--format", "raw", "--workers", "1"]
    with monkeypatch.context() as full:
        usage = shutil.disk_usage(tmp_path)._replace(free=1000)
        full.setattr(frame_cache_writing.shutil, "disk_usage", lambda path: usage)
        assert main([*command, "--output", str(tmp_path)]) == 2
    assert not any(tmp_path.iterdir())  # What is refused leaves nothing behind.
    capsys.readouterr()
    assert main([*command, "--output", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert "as the policy resizes them: raw" in told
    assert "GB to write" in told
    assert "frames of 1 camera," in told
    assert isinstance(open_split(run, plugins, "train"), CachedSource)
    rows, decoded = open_rows(run, plugins=plugins), open_rows(quickstart, *few, plugins=plugins)
    assert len(rows) == len(decoded)
    resize = run.policy.transforms()[0]
    for ours, theirs in zip(rows[:6:5], decoded[:6:5], strict=True):
        samples = [resize({"images": run.data.repack()(row)["images"]}) for row in (ours, theirs)]
        ((camera, image),) = samples[1]["images"].items()
        np.testing.assert_array_equal(samples[0]["images"][camera], image)
    rows.close()
    assert samples[0]["images"][camera].any()  # A raw frame is a view of a file.
    (folder,) = tmp_path.iterdir()
    damage(folder / "observation.image-000000.raw")
    assert main([*command, "--output", str(tmp_path)]) == 0
    assert "damaged, written again: observation.image-000000.raw" in capsys.readouterr().out
    assert main([*command, "--output", str(tmp_path)]) == 0
    assert "all parts are complete and their hashes are correct" in capsys.readouterr().out


def damage(path):
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))


def test_commands_for_other_episodes_leave_what_is_there(video_dataset, tmp_path, monkeypatch, capsys):
    plugins = repository_plugins()

    def command(episodes):
        data = config(video_dataset.root, episodes=episodes, validation_episodes=(), cache_dir=str(tmp_path))
        source = SimpleNamespace(run=Run(data=data, policy=ToyPolicy()))
        cache._convert(Namespace(format="raw", quality=None, output="", workers=1), source.run, source, plugins)
        rows = cached(data.model_copy(update={"cache": "raw"}))
        same_rows(rows.__getitems__(range(len(rows))), open_lerobot(data, 0, "train").__getitems__(range(len(rows))))
        return capsys.readouterr().out

    def files():
        return {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*.raw")}

    assert "parts are complete" in command(("0-1",))
    first = files()
    assert "all frames are there, among others, and their hashes are right" in command((1,))
    assert files() == first
    assert "0 of 1 parts are complete" in command(("0-2",))
    assert files().items() > first.items()
    second = files()
    damage(next(iter(files().keys() - first.keys())))
    whole = config(video_dataset.root, episodes=(2,), validation_episodes=(), cache_dir=str(tmp_path))
    source = SimpleNamespace(run=Run(data=whole, policy=ToyPolicy()))
    with pytest.raises(UserError, match=r"has these frames among others, but is damaged: \S+-000000.raw. Run"):
        cache._convert(Namespace(format="raw", quality=None, output="", workers=1), source.run, source, plugins)
    assert files().keys() == second.keys()


class Run(SimpleNamespace):
    """What the command asks of a run's config."""

    def model_copy(self, update):
        return Run(**{**vars(self), **update})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "raw", "--quality", "90"], "--quality is for JPEG"),
        (["--format", "jpeg", "--quality", "0"], "is not between 1 and 100"),
        (["--format", "raw", "--workers", "0"], "must be at least 1"),
    ],
)
def test_options_that_would_be_ignored_are_refused(options, message, capsys):
    assert main(["cache", "none.toml", *options]) == 2
    assert message in capsys.readouterr().err


def test_a_quality_without_jpeg_is_refused():
    with pytest.raises(ValueError, match='cache_quality is for cache = "jpeg": set both'):
        config("data", cache_quality=80)


def test_what_makes_pictures_is_looked_for_before_a_run(monkeypatch):
    plugins = repository_plugins()

    def report(*settings):
        return check_run(load_config("examples/quickstart.toml", settings, plugins), plugins)

    assert "there is no cache of" in str(report("data.cache=raw", "data.cache_dir=/none").findings)
    assert "data.cache_dir does nothing here" in str(report("data.cache_dir=/none").warnings)
    assert "not checked here: whether it loads" in report("data.decoder=torchcodec").facts["decoder"]
    monkeypatch.setattr("rlinf_core.data.lerobot.source.find_spec", lambda name: None)
    assert "torchcodec is not installed" in str(report("data.decoder=torchcodec").findings)
    assert "decoder" not in report().facts


def _images(run, rows, pipeline):
    resize = run.policy.transforms()[0]
    assert pipeline is None
    samples = [resize({"images": run.data.repack()(row)["images"]}) for row in rows]
    return np.stack([image for sample in samples for image in sample["images"].values()])


def test_frames_of_several_sizes_need_jpeg(image_dataset, tmp_path, monkeypatch):
    work = conversion(config(image_dataset.root), tmp_path)
    rows = type(work).rows

    def smaller(self, positions):
        found = rows(self, positions)
        found[-1][CAMERAS[0]] = found[-1][CAMERAS[0]][:8]
        return found

    monkeypatch.setattr(Conversion, "rows", smaller)
    with pytest.raises(UserError, match=r"have several sizes, \[8, 32\] and \[32, 32\]: .* use --format jpeg"):
        convert(work, find_missing(work), workers=0, progress=lambda done, all: None)


def test_the_module_that_runs_read_with_loads_no_torch():
    assert "torch" not in frame_cache.__dict__
