"""`open_rows` and `open_samples`: what people do with them in a notebook, against lerobot's own reader."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import toy_mixture
from distributions import ROOT
from PIL import Image

from rlinf_core import UserError, open_rows, open_samples
from rlinf_core.config.load import load_config
from rlinf_core.data.normalize import NormStats, load_norm_stats, save_norm_stats
from rlinf_core.plugins.registry import Plugins
from rlinf_core.testing import write_tiny_dataset

QUICKSTART = "examples/quickstart.toml"
PYAV = "data.decoder=pyav"
FEW = ["data.episodes=[0, 1]", "data.validation_fraction=0", "runner.val_check_interval=0", PYAV]
CAMERA = "observation.images.front"
HORIZON = 5

ARM = """
[runner]
name = "arm"
output_dir = "{folder}"
max_steps = 4
[data]
config_name = "pi05_custom"
repo_id = "{folder}/data"
images = {{ base_0_rgb = "observation.images.front" }}
state = ["observation.state"]
actions = ["action"]
raw_action_is_delta = true
num_workers = 0
[policy]
variant = "dummy"
action_horizon = 5
action_dim = 4
[trainer]
device = "cpu"
global_batch_size = 4
micro_batch_size = 4
param_dtype = "fp32"
"""

FLEET = """
[data]
num_workers = 0
[[data.mixture]]
name = "slow"
config_name = "pi05_custom"
repo_id = "{slow}"
images = {{ base_0_rgb = "observation.images.front" }}
state = ["observation.state"]
actions = ["action"]
raw_action_is_delta = true
[[data.mixture]]
name = "fast"
config_name = "pi05_custom"
repo_id = "{fast}"
images = {{ base_0_rgb = "observation.images.front" }}
state = ["observation.state"]
actions = ["action"]
raw_action_is_delta = true
validation_episodes = [3]
[policy]
variant = "dummy"
action_horizon = 5
action_dim = 4
[trainer]
device = "cpu"
global_batch_size = 4
micro_batch_size = 4
param_dtype = "fp32"
"""


@pytest.fixture
def rows():
    with open_rows(QUICKSTART, *FEW) as rows:
        yield rows


@pytest.fixture(scope="module")
def missing_instructions(tmp_path_factory, video_dataset):
    """A config of a dataset of videos whose second task is an empty text."""
    folder = tmp_path_factory.mktemp("missing_instructions")
    root = shutil.copytree(video_dataset.root, folder / "data")
    tasks = pq.read_table(root / "meta" / "tasks.parquet").to_pandas()
    tasks.index = [tasks.index[0], *[""] * (len(tasks) - 1)]
    tasks.index.name = "task"
    tasks.to_parquet(root / "meta" / "tasks.parquet")
    (folder / "run.toml").write_text(ARM.format(folder=folder))
    return folder / "run.toml"


@pytest.fixture(scope="module")
def mixed_rates(tmp_path_factory, image_dataset):
    """A config of a mixture of two datasets: one at 10 and, with other numbers, one at 30 Hz."""
    folder = tmp_path_factory.mktemp("mixed_rates")
    slow, fast = image_dataset.root, folder / "fast"
    write_tiny_dataset(fast, seed=1)
    info = json.loads((fast / "meta" / "info.json").read_text())
    (fast / "meta" / "info.json").write_text(json.dumps(info | {"fps": 30}))
    for path in (fast / "data").rglob("*.parquet"):
        table = pq.read_table(path)
        at = table.column_names.index("timestamp")
        times = (table["frame_index"].to_numpy() / 30).astype(np.float32)
        pq.write_table(table.set_column(at, table.field(at), [times]), path)
    (folder / "run.toml").write_text(FLEET.format(slow=slow, fast=fast))
    return folder / "run.toml"


def lerobot_rows(root, horizon=HORIZON, fps=10):
    """lerobot's own reader of a dataset, with the action chunks of a run."""
    module = pytest.importorskip("lerobot.datasets.lerobot_dataset")
    steps = {"action": [step / fps for step in range(horizon)]}
    return module.LeRobotDataset(
        "tests/rows", root, delta_timestamps=steps, video_backend="pyav", return_uint8=True, tolerance_s=1e-3
    )


def check_equal(ours, theirs, cameras):
    assert ours["task"] == theirs["task"]
    for column in ours.keys() - {"task"}:
        expected = theirs[column]
        if column in cameras:
            expected = expected if not expected.is_floating_point() else (expected * 255).round()
            expected = expected.permute(1, 2, 0)
        np.testing.assert_array_equal(ours[column], expected.numpy(), err_msg=column)


def same_row(one, other):
    assert one.keys() == other.keys()
    for column, value in one.items():
        np.testing.assert_array_equal(value, other[column])


def test_rows_of_the_quickstart_equal_lerobots_own():
    theirs = lerobot_rows("examples/data/metaworld_3tasks", fps=20)
    with open_rows(QUICKSTART, PYAV) as train, open_rows(QUICKSTART, PYAV, split="validation") as held_out:
        assert len(train) + len(held_out) == len(theirs)
        assert not set(train.episodes) & set(held_out.episodes)
        for rows in (train, held_out):
            for ours in rows[:: len(rows) // 4]:
                check_equal(ours, theirs[ours["index"]], {"observation.image"})


def test_rows_of_a_dataset_without_some_instructions_equal_lerobots_own(missing_instructions):
    theirs = lerobot_rows(missing_instructions.parent / "data")
    with open_rows(missing_instructions, PYAV) as rows:
        assert len(rows) == len(theirs)
        assert {row["task"] for row in rows.without_images()} == {"push the block", ""}
        for index, ours in enumerate(rows):
            check_equal(ours, theirs[index], {CAMERA})


@pytest.mark.parametrize(("source", "fps"), [("slow", 10), ("fast", 30)])
def test_rows_of_a_source_of_a_mixture_equal_lerobots_own(mixed_rates, source, fps):
    with open_rows(mixed_rates, source=source) as rows:
        theirs = lerobot_rows(rows.run.data.repo_id, fps=fps)
        for ours in rows:
            check_equal(ours, theirs[ours["index"]], {CAMERA})
        assert rows[1]["timestamp"] == np.float32(1 / fps)


def test_negative_and_numpy_indices_are_those_of_a_list(rows):
    same_row(rows[-1], rows[len(rows) - 1])
    same_row(rows[-len(rows)], rows[0])
    for index in (np.int64(3), np.uint8(3), np.array(3)):
        same_row(rows[index], rows[3])


def test_slices_are_views_with_the_items_of_a_list(rows):
    numbers = list(range(len(rows)))
    light = rows.without_images()
    for cut in (slice(2, 6), slice(None, None, 9), slice(-3, None), slice(8, 2, -2), slice(5, 5), slice(0, 10**6)):
        view = light[cut]
        assert len(view) == len(numbers[cut])
        assert [row["index"] for row in view] == [light[i]["index"] for i in numbers[cut]]
        assert view.episodes.tolist() == rows.episodes[cut].tolist()
    assert light[2:8][1::2][-1]["frame_index"] == 7
    assert "observation.image" in rows[2:4][0]
    assert not rows[5:5]


def test_a_loop_ends_and_can_begin_again(rows):
    light = rows.without_images()
    frames = [(row["episode_index"], row["frame_index"]) for row in light]
    assert frames == sorted(frames)
    assert len(frames) == len(rows)
    assert [(row["episode_index"], row["frame_index"]) for row in light] == frames
    assert next(iter(reversed(light)))["frame_index"] == frames[-1][1]


def test_the_length_is_that_of_the_chosen_episodes(rows):
    assert set(rows.episodes) == {0, 1}
    with open_rows(QUICKSTART, *FEW[1:]) as everything:
        assert len(rows) == np.isin(everything.episodes, [0, 1]).sum() < len(everything)


def test_an_image_is_what_matplotlib_shows(rows):
    image = rows[0]["observation.image"]
    assert (image.dtype, image.shape) == (np.uint8, (224, 224, 3))
    assert rows[0].keys() >= {"task", "episode_index", "frame_index", "action", "observation.state"}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_data_loader_reads_rows_and_samples(workers):
    from torch.utils.data import DataLoader

    options = {"num_workers": workers, "multiprocessing_context": "spawn" if workers else None}
    with open_rows(QUICKSTART, *FEW) as rows:
        first, second = DataLoader(rows[:6], batch_size=4, **options)
        assert first["observation.image"].shape == (4, 224, 224, 3)
        assert second["index"].tolist() == [4, 5]
        np.testing.assert_array_equal(first["observation.image"][3], rows[3]["observation.image"])
    with open_samples(QUICKSTART, *FEW) as samples:
        (batch,) = DataLoader(samples[:3], batch_size=3, collate_fn=list, **options)
        np.testing.assert_array_equal(batch[2]["actions"], samples[2]["actions"])


def test_rows_and_samples_can_be_pickled(rows):
    rows[0]  # Opens the video, which a copy does not take along.
    same_row(pickle.loads(pickle.dumps(rows[2:]))[0], rows[2])
    with open_samples(QUICKSTART, *FEW) as samples:
        copy = pickle.loads(pickle.dumps(samples))
        np.testing.assert_array_equal(copy[-1]["actions"], samples[-1]["actions"])
        copy.close()
        assert samples[0]["prompt"] == rows[0]["task"]


def test_two_sequences_are_independent(rows):
    with open_rows(QUICKSTART, *FEW) as other:
        same_row(other[4], rows[4])
    same_row(rows[5], rows[5])
    with pytest.raises(UserError, match=r"the data are closed: read them inside the `with` block, or open them again"):
        other[4]


def open_files(folder):
    links = (Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd"))
    return [path for path in (os.path.realpath(link) for link in links) if path.startswith(str(folder))]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="open files are counted in /proc")
@pytest.mark.parametrize("decoder", ["pyav", "auto"])
def test_leaving_the_block_closes_files_also_after_an_error(missing_instructions, decoder):
    folder = missing_instructions.parent
    kept = None
    try:
        with open_rows(missing_instructions, f"data.decoder={decoder}") as rows:
            view, image = rows[1:], rows[0][CAMERA]
            assert decoder == "auto" or open_files(folder)
            rows[len(rows)]
    except IndexError as error:
        kept = error  # It holds the frames that read the rows, as a notebook does with the last error.
    assert kept is not None
    assert open_files(folder) == []
    assert image.shape == (32, 32, 3)
    for closed in (rows, view, rows.without_images()):
        with pytest.raises(UserError, match="the data are closed"):
            closed[0]
    rows.close()


def test_samples_are_what_the_run_encodes_with_the_statistics_that_it_saves(tmp_path):
    from rlinf_core.data.pipeline import build_pipeline

    settings = [*FEW, f"runner.output_dir={tmp_path}"]
    with open_rows(QUICKSTART, *settings) as rows, open_samples(QUICKSTART, *settings) as samples:
        assert len(samples) == len(rows)
        sample, row = samples[3], rows[3]
        assert sample.keys() >= {"images", "state", "actions", "prompt", "tokens"}
        assert "noise" not in sample
        np.testing.assert_allclose(samples.pipeline.decode(sample["actions"], sample), row["action"], atol=1e-5)
        assert samples.without_images()[3]["images"] == {}
        stats = samples.pipeline.normalize.stats
    save_norm_stats(tmp_path / "norm_stats.json", dict(stats))
    given = load_norm_stats(tmp_path / "norm_stats.json")
    expected = build_pipeline(rows.run.data, rows.run.policy, given).encode(row)
    np.testing.assert_allclose(sample["actions"], expected["actions"], atol=1e-5)
    with open_samples(QUICKSTART, *settings, f"data.norm_stats={tmp_path}/norm_stats.json") as samples:
        np.testing.assert_allclose(samples[3]["actions"], sample["actions"], atol=1e-5)


def test_held_out_samples_are_normalised_by_the_training_rows():
    with open_samples(QUICKSTART, PYAV) as train, open_samples(QUICKSTART, PYAV, split="validation") as held_out:
        ours, theirs = (one.pipeline.normalize.stats["actions"] for one in (train, held_out))
        np.testing.assert_array_equal(ours.mean, theirs.mean)
        assert len(held_out) == 285


def test_statistics_that_would_spoil_a_run_are_raised_and_weak_ones_are_warnings(tmp_path):
    wide = {key: NormStats(*(np.full(4, value) for value in (0.0, 1e6, -2e6, 2e6))) for key in ("state", "actions")}
    save_norm_stats(tmp_path / "wide.json", wide)
    with open_samples(QUICKSTART, *FEW, f"data.norm_stats={tmp_path}/wide.json") as samples:
        assert any("action" in warning for warning in samples.warnings)
    narrow = {key: NormStats(*(np.arange(3.0) for _ in range(4))) for key in ("state", "actions")}
    save_norm_stats(tmp_path / "narrow.json", narrow)
    with pytest.raises(UserError, match="the statistics of 'actions' have 3 numbers, the data have 4"):
        open_samples(QUICKSTART, *FEW, f"data.norm_stats={tmp_path}/narrow.json")


def test_a_loaded_config_is_taken_and_cannot_be_overridden():
    run = load_config(QUICKSTART, FEW)
    with open_rows(run) as rows:
        assert rows.run == run
    with pytest.raises(UserError, match=r"'data.episodes=\[1\]' cannot override a loaded config: pass the TOML file"):
        open_rows(run, "data.episodes=[1]")


@pytest.mark.parametrize("opener", [open_rows, open_samples])
def test_mistakes_have_a_way_out(opener, tmp_path, mixed_rates):
    def message(*arguments, **options):
        with pytest.raises(UserError) as error:
            opener(*arguments, **options)
        return str(error.value)

    assert message(QUICKSTART, split="valid") == "there is no split 'valid': use train or validation"
    assert re.fullmatch(
        r"no episode of examples/data/metaworld_3tasks is held out for validation: set data\.validation_fraction or "
        r"data\.validation_episodes or data\.validation_tasks",
        message(QUICKSTART, *FEW, split="validation"),
    )
    assert "nowhere.toml: no such file (relative to " in message("nowhere.toml")
    assert "there is no file or folder ./nowhere" in message(QUICKSTART, "data.repo_id=./nowhere")
    assert "unknown dataset 'aloha'" in message(QUICKSTART, "data.config_name=aloha")
    assert message(mixed_rates).endswith("several datasets: name one of slow, fast with source=...")
    assert message(mixed_rates, source="fats") == (
        "there is no source 'fats'; did you mean 'fast'?: name one of slow, fast with source=..."
    )
    assert message(QUICKSTART, source="fast").startswith("there is no source 'fast': ")
    assert message(mixed_rates, source="slow", split="validation").startswith("slow: no episode of ")


def test_a_format_whose_plugin_is_missing_is_named(tmp_path):
    plugins = toy_mixture.toy_plugins()
    path = tmp_path / "toy.toml"
    path.write_text(toy_mixture.CONFIG)
    with open_rows(path, source="narrow", plugins=plugins) as rows:
        assert rows[-1]["task"] == "push it"
    run = load_config(path, (), plugins)
    with pytest.raises(UserError, match=r"^narrow: No installed plugin opens the dataset 'narrow' \(NarrowDataset\)"):
        open_rows(run, source="narrow", plugins=Plugins())


def test_an_index_out_of_range_is_an_index_error_as_in_a_list(rows):
    for index in (len(rows), -len(rows) - 1):
        with pytest.raises(IndexError, match=rf"index {index} is out of range: .* has indices 0 to {len(rows) - 1}"):
            rows[index]
    with pytest.raises(IndexError, match=r"index 0 is out of range: .* is empty"):
        rows[3:3][0]
    with pytest.raises(TypeError, match="indices are integers or slices, not 'action'"):
        rows["action"]


def test_a_row_that_cannot_be_read_is_named(tmp_path, image_dataset):
    root = shutil.copytree(image_dataset.root, tmp_path / "data")
    path = sorted((root / "data").rglob("*.parquet"))[0]
    table = pq.read_table(path)
    at = table.column_names.index(CAMERA)
    images = table[CAMERA].to_pylist()
    images[2]["bytes"] = b"damaged"
    pq.write_table(table.set_column(at, table.field(at), pa.array(images, table.field(at).type)), path)
    (tmp_path / "run.toml").write_text(ARM.format(folder=tmp_path))
    with open_rows(tmp_path / "run.toml") as rows:
        assert rows[1][CAMERA].shape == (32, 32, 3)
        with pytest.raises(UserError, match=r"episode 0, frame 2\]"):
            rows[2]
        assert rows.without_images()[2]["frame_index"] == 2


def test_torch_stays_unloaded_and_nothing_is_written(tmp_path):
    code = (
        "import os, sys, rlinf_core; "
        f"rows = rlinf_core.open_rows({str(ROOT / QUICKSTART)!r}, *sys.argv[1:]); rows[0]; "
        f"samples = rlinf_core.open_samples({str(ROOT / QUICKSTART)!r}, *sys.argv[1:]); samples[0]; "
        "print('torch' in sys.modules, 'huggingface_hub' in sys.modules, os.listdir())"
    )
    data = f"data.repo_id={ROOT}/examples/data/metaworld_3tasks"
    command = [sys.executable, "-c", code, data, *FEW]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert result.stdout.split(maxsplit=2) == ["False", "False", "[]\n"]


def test_the_page_plots_an_episode_and_shows_an_image(tmp_path):
    import matplotlib

    matplotlib.use("agg")
    page = (ROOT / "docs" / "notebook.md").read_text(encoding="utf-8")
    source = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)[0]
    found = {}
    exec(compile(source, "notebook.md", "exec"), found)
    found["figure"].savefig(tmp_path / "episode.png")
    found["plt"].close("all")
    assert Image.open(tmp_path / "episode.png").size == (1000, 400)
    assert found["actions"].shape == (len(found["episode"]), 4)
    (line, *_) = found["left"].lines
    np.testing.assert_array_equal(line.get_ydata(), found["actions"][:, 0])
    np.testing.assert_array_equal(found["right"].images[0].get_array(), found["row"]["observation.image"])
