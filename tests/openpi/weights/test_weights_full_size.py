"""The real size: a published π0.5 in bfloat16 is loaded tensor by tensor, converted, and exported from a run.

Takes 36 GB of disk, 20 GB of memory and ten minutes: `pytest -m slow tests/openpi/weights/test_weights_full_size.py`.
"""

import json
import math
import re
import shutil
import threading
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from saved_run import save_run

from rlinf_core import cli
from rlinf_core.config.load import load_config
from rlinf_core.data.normalize import NormStats
from rlinf_core.plugins.registry import get_plugins
from rlinf_core.training.distributed.processes import processes
from rlinf_core.training.state.build import build_policy
from rlinf_core.training.state.fsdp import materialize, ranks_mesh, shard
from rlinf_plugins_openpi.inputs.tokenizer import SMALL_MODEL
from rlinf_plugins_openpi.model.dimensions import Pi0Dimensions
from rlinf_plugins_openpi.model.pi0 import Pi0
from rlinf_plugins_openpi.weights.convert import convert
from rlinf_plugins_openpi.weights.names import UNUSED
from rlinf_plugins_openpi.weights.saving import Entry, write_safetensors
from rlinf_plugins_openpi.weights.source import PublishedWeights

LAYOUT = Path(__file__).parents[2] / "golden" / "model" / "published_layout.json"
DIMENSIONS = Pi0Dimensions.of("base", pi05=True, action_dim=32, action_horizon=50)
SHARDS = 4
GB = 1e9


def random_bits(shape, generator):
    """bfloat16 numbers of 2^-7 to 2, of random bits: drawing normal ones would take longer than the test."""
    bits = torch.empty(shape, dtype=torch.int16).random_(0x3C00, 0x4000, generator=generator)
    return bits.view(torch.bfloat16)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder with an index and its shards."""
    folder, layout = tmp_path_factory.mktemp("published"), json.loads(LAYOUT.read_text())
    shapes = {key: shape for key, (shape, _) in layout["pi05"].items() if key not in layout["save_model_drops"]}
    generator, index = torch.Generator().manual_seed(0), {}
    for number in range(SHARDS):
        keys, file = [*shapes][number::SHARDS], f"model-{number}.safetensors"
        entries = {key: Entry("BF16", tuple(shapes[key])) for key in keys}
        write_safetensors(folder / file, entries, ((key, random_bits(shapes[key], generator)) for key in keys))
        index |= dict.fromkeys(keys, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    yield folder
    for file in folder.iterdir():
        file.unlink()


def own_memory():
    """GB that this process holds, without pages of files."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]) * 1024 / GB


@contextmanager
def watched_memory():
    """A list whose last entry is the most memory, in GB, that this process held while the block ran."""
    peak, done = [own_memory()], threading.Event()

    def watch():
        while not done.wait(0.1):
            peak.append(max(peak[-1], own_memory()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_loading_holds_the_model_and_one_tensor(published):
    source, peak = PublishedWeights(published, DIMENSIONS), 0.0
    with torch.device("meta"):
        model = Pi0(DIMENSIONS)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    source.check(shapes)

    def value(name, shape):
        nonlocal peak
        peak = max(peak, own_memory())
        return source.tensor(name)

    before = own_memory()
    with processes("cpu") as group:
        shard(model, ranks_mesh(group.device.type, group.size), compute_dtype=torch.bfloat16)
        materialize(model, torch.device("cpu"), value)
        peak = max(peak, own_memory())
        size = sum(math.prod(shape) for shape in shapes.values()) * 4 / GB
        largest = max(math.prod(shape) for shape in shapes.values()) * 4 / GB
        print(f"model {size:.1f} GB, largest tensor {largest:.1f} GB, peak {peak:.1f} GB, before {before:.1f} GB")
        assert peak < before + size + 2 * largest
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter.full_tensor().bfloat16(), source.tensor(name)), name


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_converting_holds_one_tensor_and_changes_no_bit(published, tmp_path):
    before = own_memory()
    done = convert(str(published), tmp_path)
    assert own_memory() - before < 3
    index = json.loads((published / "model.safetensors.index.json").read_text())["weight_map"]
    with safe_open(done.path, framework="pt") as ours:
        assert set(ours.keys()) == set(index)
        for key, file in index.items():
            with safe_open(published / file, framework="pt") as theirs:
                wanted = theirs.get_tensor(key)
            wanted = torch.zeros_like(wanted) if key in UNUSED else wanted
            assert torch.equal(ours.get_tensor(key), wanted), key
    done.path.unlink()


RUN = """
[runner]
name = "run"
max_steps = 1
[data]
config_name = "pi05_metaworld"
repo_id = "lab/arm"
[policy]
weights = "random"         # those that are loaded below: for others it would want PaliGemma's tokenizer
tokenizer = "{tokenizer}"
action_horizon = 50
[trainer]
device = "cpu"
"""


@pytest.fixture(scope="module")
def run(published, tmp_path_factory):
    """The folder of a run that has loaded the published weights, as its trainer does, and saved a checkpoint."""
    folder = tmp_path_factory.mktemp("run")
    shutil.copy(SMALL_MODEL, folder / "some.model")
    (folder / "run.toml").write_text(RUN.format(tokenizer=folder / "some.model"))
    run = load_config(folder / "run.toml", [f"runner.output_dir={folder}"])
    assert run.policy.dimensions == DIMENSIONS
    with processes("cpu") as group, watched_memory() as peak:
        save_loaded(run, published, group)
    print(f"loading and saving a checkpoint: {peak[-1]:.1f} GB")
    assert peak[-1] < 24
    yield run.folder
    shutil.rmtree(folder)


def save_loaded(run, published, group):
    """Apart, so that nothing holds the model afterwards."""
    weights = PublishedWeights(published, DIMENSIONS)
    policy, _ = build_policy(run, run.trainer, group, get_plugins(), weights)
    stats = NormStats(*[np.arange(4.0) + number for number in range(4)])
    save_run(run, dict(policy.named_parameters()), {"state": stats, "actions": stats}, group)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("dtype", "floats"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_a_checkpoint_is_exported_to_the_bit(published, run, tmp_path, dtype, floats):
    with watched_memory() as peak:
        assert cli.main(["export", str(run), "--output", str(tmp_path / "policy"), "--dtype", dtype]) == 0
    print(f"exporting in {dtype}: {peak[-1]:.1f} GB")
    assert peak[-1] < 24
    index = json.loads((published / "model.safetensors.index.json").read_text())["weight_map"]
    with safe_open(tmp_path / "policy" / "model.safetensors", framework="pt") as ours:
        assert set(ours.keys()) == set(index)
        for key in index.keys() - UNUSED:
            with safe_open(published / index[key], framework="pt") as theirs:
                assert torch.equal(ours.get_tensor(key), theirs.get_tensor(key).to(floats)), key
        assert not any(ours.get_tensor(key).any() for key in UNUSED)
    shutil.rmtree(tmp_path / "policy")
