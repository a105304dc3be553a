"""What we use of other libraries' less public names is in one place each, and is as we need it."""

import ast
import dataclasses
import inspect
import re
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from distributions import ROOT
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from rlinf_core import torch_names
from rlinf_core.training.checkpoint import shards

LESS_PUBLIC = re.compile(
    r"torch(\.\w+)*\._\w+|torch\.distributed\.(checkpoint|elastic|launcher)\b.*|torch\.utils\.flop_counter.*|lerobot\b.*"
)
"""Modules and names whose place nobody promises, and all of lerobot."""
HOMES = {
    "rlinf_core/torch_names.py": re.compile(r"torch\."),
    "rlinf_core/torchrun.py": re.compile(r"torch\.distributed\.(elastic|launcher)"),
    "rlinf_core/testing/lerobot.py": re.compile(r"lerobot\."),
}
ATTRIBUTES = re.compile(
    r"\._(cdata|schema|overloadpacket|destroy|spec|cached_\w+|scaled_dot_product\w*|use_count|flash_attention\w*|varlen_attn)\b"
)
"""Attributes of torch's objects."""
PROJECTS = ("rlinf_core", "rlinf_plugins_openpi", "plugins")
SOURCES = [path for name in PROJECTS for path in (ROOT / name).rglob("src/**/*.py")]


def imported(path):
    """What a file imports, each with its module."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_less_public_names_are_used_in_one_place():
    assert len(SOURCES) > 200
    found = []
    for path in SOURCES:
        home = next((allowed for name, allowed in HOMES.items() if str(path).endswith(name)), None)
        used = [name for name in imported(path) if LESS_PUBLIC.fullmatch(name)]
        found += [f"{path}: {name}" for name in used if not (home and home.match(name))]
        if not str(path).endswith("rlinf_core/torch_names.py"):
            code = ast.unparse(ast.parse(path.read_text()))  # Without comments.
            found += [f"{path}: {match[0]}" for match in ATTRIBUTES.finditer(code)]
    assert found == []


def test_every_name_is_there():
    assert [name for name in torch_names.__all__ if not hasattr(torch_names, name)] == []
    missing = [
        f"{module}.{name}"
        for module, names in shards.INDEX_NAMES.items()
        for name in names
        if not hasattr(__import__(module, fromlist=["_"]), name)
    ]
    assert missing == []


def test_torchruns_names_are_there():
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
    from torch.distributed.elastic.rendezvous.api import RendezvousError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    assert callable(elastic_launch)
    assert all(issubclass(error, Exception) for error in (SignalException, ChildFailedError, RendezvousError))
    ours = {"min_nodes", "max_nodes", "nproc_per_node", "run_id", "rdzv_backend", "rdzv_endpoint", "max_restarts"}
    assert ours <= {field.name for field in dataclasses.fields(LaunchConfig)}
    assert {"exitcode", "pid"} <= {field.name for field in dataclasses.fields(ProcessFailure)}
    assert callable(ChildFailedError.get_first_failure)


def test_fsdp_asks_only_for_some_of_the_shards_that_it_cuts():
    """A rehearsal cuts those that are asked for: all would take minutes for a thousand ranks."""
    fsdp = torch_names.fsdp_parameters()
    assert list(inspect.signature(fsdp._chunk_with_empty).parameters) == ["tensor", "num_chunks", "dim"]
    uses = re.findall(r"\bchunks\b(?! = )(\[.+?\])?", inspect.getsource(fsdp))
    assert set(uses) == {"[shard_rank]", "[0]", "[mesh_info.shard_mesh_rank]"}


def test_the_cached_plans_of_a_planner_are_forgotten():
    planner = shards.Planner()
    caches = torch_names.plan_caches()
    assert all(isinstance(cache, dict) for cache in caches)
    caches[0][planner._cached_plans_key] = object()
    planner.forget()
    assert planner._cached_plans_key not in caches[0]


def test_a_checkpoints_writer_and_index_take_what_we_give_them(tmp_path):
    writer = shards.ShardWriter(tmp_path)
    assert writer.fs is writer.files
    assert {"storage_meta", "storage_data", "version"} <= {f.name for f in dataclasses.fields(torch_names.Metadata)}
    assert {"index", "storage_data"} <= {field.name for field in dataclasses.fields(torch_names.WriteResult)}
    save, load = (inspect.signature(one).parameters for one in (torch_names.write_shards, torch_names.read_shards))
    assert {"storage_writer", "planner", "process_group"} <= save.keys()
    assert {"storage_reader", "no_dist"} <= load.keys()


def test_a_shard_can_live_elsewhere_than_its_mesh():
    dist.init_process_group("gloo", store=torch_names.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        whole = distribute_tensor(torch.arange(6.0), mesh, [Shard(0)])
        copy = torch_names.shard_like(whole, torch.full((6,), 2.0))
        assert (copy.shape, copy.placements) == (whole.shape, whole.placements)
        assert copy.to_local().tolist() == [2.0] * 6
    finally:
        dist.destroy_process_group()


def test_references_to_a_tensor_are_counted():
    tensor = torch.zeros(1)
    assert torch_names.holders_of(tensor) == 1
    view = tensor[0]  # Holds what it is a view of.
    assert torch_names.holders_of(tensor) == 2
    del view
    assert torch_names.holders_of(tensor) == 1


class Names(torch_names.TorchDispatchMode):
    """Notes operations, and whether their results share memory."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen[torch_names.name_of(func)] = torch_names.shares_memory(func)
        return func(*args, **(kwargs or {}))


def test_operations_say_what_they_are():
    with Names() as names:
        x = torch.ones(2, 3)
        y = x.t() @ x
        y.add_(1)
    assert names.seen["aten.t"]
    assert names.seen["aten.add_"]
    assert not names.seen["aten.mm"]
    changing = [
        torch.ops.aten.add_.Tensor,
        torch.ops.aten.add.out,
        torch.ops.aten.add.Tensor,
        torch.ops.aten.view.default,
    ]
    assert [torch_names.changes_arguments(one) for one in changing] == [True, True, False, False]
    assert torch_names.packet_of(torch.ops.aten.mm.default) in torch_names.flop_registry
    storages = x.untyped_storage(), x.t().untyped_storage(), y.untyped_storage()
    one, same, other = map(torch_names.storage_address, storages)
    assert one == same != other


@pytest.mark.parametrize("kernel", ["flash", "varlen"])
def test_fused_attention_is_dispatched_under_the_names_that_are_counted(kernel):
    from torch.nn.attention.varlen import varlen_attn

    starts = torch.tensor([0, 3, 8], dtype=torch.int32)
    with Names() as names:
        if kernel == "flash":
            q, k, v = (torch.ones(1, 2, 8, 16, device="meta", dtype=torch.bfloat16, requires_grad=True) for _ in "qkv")
            out = torch_names.flash_attention(q, k, v)
        else:
            q, k, v = (torch.ones(8, 2, 16, device="meta", dtype=torch.bfloat16, requires_grad=True) for _ in "qkv")
            given = starts.to("meta")
            out = varlen_attn(q, k, v, given, given, 5, 5, scale=0.25, window_size=(-1, 0))
        torch.autograd.backward(out.sum())
    forward, backward = {
        "flash": (torch_names.FLASH, torch_names.FLASH_BACKWARD),
        "varlen": (torch_names.VARLEN, torch_names.VARLEN_BACKWARD),
    }[kernel]
    assert {forward, backward} <= names.seen.keys()
    assert out.shape == q.shape
    assert forward in {torch_names.name_of(operation) for operation in torch_names.ATTENTION}


def test_attention_can_be_replaced_for_a_while():
    calls = []

    def replacement(q, k, v, *args, **kwargs):
        calls.append(q.shape)
        return torch_names.attention_spelt_out(q, k, v)

    q = torch.ones(1, 2, 8, 16, device="meta")
    attend = nn.functional.scaled_dot_product_attention
    with torch_names.implemented("scaled_dot_product_attention", replacement, "AutogradMeta"):
        assert attend(q, q, q).shape == q.shape
    attend(q, q, q)
    assert len(calls) == 1


def test_a_fused_optimizer_divides_gradients_and_skips_steps():
    """By the attributes that torch.amp.GradScaler sets, which `training.state.optim` sets, too."""

    def stepped(scale, skip):
        parameter = nn.Parameter(torch.ones(1))
        optimizer = torch.optim.AdamW([parameter], lr=1.0, betas=(0.5, 0.5), weight_decay=0.0, fused=True)
        parameter.grad = torch.full((1,), 8.0)
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.tensor(skip)
        optimizer.step()
        return parameter.item(), optimizer.state[parameter]["exp_avg"].item()

    weight, mean = stepped(16.0, 0.0)
    assert weight < 1
    assert mean == 0.25  # Half of 8 / 16.
    assert stepped(16.0, 1.0) == (1.0, 0.0)


@pytest.mark.slow
def test_core_trains_on_a_lerobot_dataset_without_lerobot(tmp_path):
    """Reading, statistics, training, export."""
    code = (
        "import sys; sys.modules['lerobot'] = None\n"
        "from rlinf_core import cli, train\n"
        "out = sys.argv[1]\n"
        "assert train.main(['examples/quickstart.toml', f'runner.output_dir={out}', 'runner.name=run',\n"
        "    'runner.max_steps=1', 'data.episodes=[\"0-1\"]', 'data.num_workers=0', 'trainer.device=cpu',\n"
        "    'trainer.global_batch_size=2', 'trainer.micro_batch_size=2', 'data.validation_fraction=0',\n"
        "    'runner.val_check_interval=0']) == 0\n"
        "assert cli.main(['export', f'{out}/run', '--output', f'{out}/exported']) == 0\n"
    )
    result = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_what_writes_tiny_datasets_names_the_extra_where_there_is_no_lerobot(tmp_path, monkeypatch):
    from rlinf_core import UserError
    from rlinf_core.testing import write_tiny_dataset

    monkeypatch.setitem(sys.modules, "lerobot.datasets.lerobot_dataset", None)
    monkeypatch.setitem(sys.modules, "lerobot", None)
    with pytest.raises(UserError, match=r"pip install 'rlinf-core\[lerobot\]'"):
        write_tiny_dataset(tmp_path / "data")
