"""The real size: a published π0.5 in bfloat16 is loaded under FSDP2 tensor by tensor, and converted bit for bit.

Takes 14 GB of disk, 20 GB of memory and a few minutes: `pytest -m slow tests/test_weights_full_size.py`.
"""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from rlinf_core.training.distributed import processes
from rlinf_core.training.fsdp import materialize, shard
from rlinf_plugins_openpi.dimensions import Pi0Dimensions
from rlinf_plugins_openpi.pi0 import Pi0
from rlinf_plugins_openpi.weights import UNUSED, PublishedWeights
from rlinf_plugins_openpi.weights.convert import convert
from rlinf_plugins_openpi.weights.saving import Entry, write_safetensors

LAYOUT = Path(__file__).parent / "golden" / "model" / "published_layout.json"
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
        shard(model, group.mesh(), compute_dtype=torch.bfloat16)
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
