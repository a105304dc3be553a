"""openpi's LoRA against its JAX original: outputs, gradients, training, merging, and what its filter trains."""

import json

import numpy as np
import pytest
import torch
import torch.distributed as dist
from golden import GOLDEN, name_of
from lora_case import (
    EXPERTS,
    as_arrays,
    base_of,
    from_arrays,
    matrix_names,
    read_adapted,
    read_base,
    read_config,
    read_lora,
)
from pi0_case import max_distance, read_batch
from safetensors.torch import load_file, save_file
from test_model_bf16 import rms_distance
from torch.distributed.device_mesh import init_device_mesh

from rlinf_core import UserError, cli
from rlinf_core.contract.optim import OptimConfig, TrainedParameter
from rlinf_core.training.state.adapters import Original, find_adapters
from rlinf_core.training.state.fsdp import shard
from rlinf_core.training.state.optim import Optimizer
from rlinf_plugins_openpi.lora.apply import add_openpi_lora
from rlinf_plugins_openpi.lora.config import OpenpiLoraConfig
from rlinf_plugins_openpi.model.dimensions import VARIANTS as VARIANTS_OF_MODELS
from rlinf_plugins_openpi.model.dimensions import Pi0Dimensions, VariantSizes
from rlinf_plugins_openpi.model.parts import unpacked
from rlinf_plugins_openpi.model.pi0 import Pi0
from rlinf_plugins_openpi.weights.files import open_files
from rlinf_plugins_openpi.weights.layouts import JAX
from rlinf_plugins_openpi.weights.lora import MergedLora, Scaling
from rlinf_plugins_openpi.weights.source import PublishedWeights

OUTPUTS, SAMPLES = 1e-4, 1e-4
GRADIENT = 2e-4
LOSSES, NORM, UPDATE = 5e-4, 1e-3, 5e-3
MERGED = 1e-5
BF16 = 0.026
"""The reference's outputs in bfloat16 and float32 differ by 0.7 to 2.6 %."""


class Recorded:
    """A case of `lora/`, with our model."""

    def __init__(self, folder):
        self.name, self.folder = name_of(folder), folder
        self.lora = read_lora(folder)
        self.model = read_adapted(folder)
        self.inputs = dict(np.load(GOLDEN / read_config(folder)["inputs"]))
        self.batch = read_batch(self.inputs)
        self.noise = torch.from_numpy(self.inputs["sample_noise"])

    @torch.no_grad()
    def outputs(self, model=None):
        model = model or self.model
        prefix = model.embed_prefix(self.batch)
        t = self.batch["time"][:, None, None]
        x_t = t * self.batch["noise"] + (1 - t) * self.batch["actions"]
        suffix_out = model.run(prefix, model.embed_suffix(self.batch["state"], x_t, self.batch["time"]))
        return {
            "suffix_out": suffix_out,
            "v_t": model.velocity(suffix_out),
            "loss": model.losses(self.batch),
            "prefix_out": model.read(prefix),
            "sample_actions/steps1": model.sample_actions(self.batch, self.noise, 1),
            "sample_actions/steps4": model.sample_actions(self.batch, self.noise, 4),
        }


@pytest.fixture
def recorded(lora_case):
    return Recorded(lora_case)


def without_sampling(name):
    return SAMPLES if name.startswith("sample_actions") else OUTPUTS


def test_outputs(recorded, report):
    theirs = dict(np.load(recorded.folder / "outputs_lora.npz"))
    ours = recorded.outputs()
    assert ours.keys() == theirs.keys() - {"prefix_mask"}
    for name, value in ours.items():
        reference = theirs[name]
        if name == "prefix_out":
            reference = reference[theirs["prefix_mask"]]
            value = value[: len(reference)]
        report(recorded.name, name, max_distance(value, reference), without_sampling(name))


def test_gradients(recorded, report):
    output = recorded.model(recorded.batch)
    (output.loss_sum / output.weight).backward()
    ours = {name: p.grad for name, p in recorded.model.named_parameters() if p.grad is not None}
    ours = as_arrays(recorded.model, recorded.lora, ours)
    theirs = load_file(recorded.folder / "grads_lora_jax.safetensors")
    assert ours.keys() == theirs.keys()
    off = sum(float((ours[name] - theirs[name]).square().sum()) for name in theirs)
    size = sum(float(one.square().sum()) for one in theirs.values())
    report(recorded.name, "gradient of the adapters", (off / size) ** 0.5, GRADIENT)


def merged_weights(model):
    """The model's own parameters with the adapters in them."""
    state = dict(model.named_parameters())
    merged = {name: p.detach() for name, p in state.items() if "lora_" not in name}
    for name, module in model.named_modules():
        if hasattr(module, "merged"):
            own = {key: p.detach() for key, p in module.named_parameters()}
            merged |= {f"{name}.{key}": value for key, value in module.merged(own).items()}
    return merged


def test_merging(recorded, report):
    merged, dimensions = merged_weights(recorded.model), recorded.model.dimensions
    plain = read_base(recorded.folder)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(merged[name])
    ours, theirs = recorded.outputs(plain), recorded.outputs()
    for name, value in ours.items():
        report(recorded.name, f"merged: {name}", max_distance(value, theirs[name].numpy()), MERGED)
    parts = unpacked(merged, dimensions)
    examples = load_file(recorded.folder / "merged_examples.safetensors")
    for key, reference in examples.items():
        layer, _, array = key.partition("/")
        layer = int(layer.removeprefix("layer"))
        slots = {
            own: slot for own, slot in JAX.slots(dimensions).items() if slot.key == array and slot.at[0][0] == layer
        }
        off = max(
            float((parts[own] - slot.take(reference[None].expand(layer + 1, *reference.shape))).abs().max())
            for own, slot in slots.items()
        )
        report(recorded.name, f"merged {key}", off / float(reference.abs().max()), 1e-6)


def trainable(model, dimensions, lora):
    """The reference's names of what trains, and their numbers."""
    slots = JAX.slots(dimensions)
    own = {name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name}
    tensors = unpacked({name: model.get_parameter(name).detach() for name in own}, dimensions)
    keys = {slots[name].key for name in tensors}
    adapters = as_arrays(model, lora, {})
    return keys | adapters.keys(), sum(t.numel() for t in (*tensors.values(), *adapters.values()))


VARIANTS = {
    "gemma_2b_lora+gemma_300m_lora": ("vlm", "expert"),
    "gemma_2b_lora+gemma_300m": ("vlm",),
    "gemma_2b+gemma_300m_lora": ("expert",),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_filter_trains_what_the_references_trains(lora_case, variant, report):
    expected = json.loads((lora_case / "trainable.json").read_text())[variant]
    lora = read_lora(lora_case, VARIANTS[variant])
    model = read_base(lora_case)
    add_openpi_lora(model, lora, matrix_names(model.dimensions))
    names, numbers = trainable(model, model.dimensions, lora)
    assert names == set(expected["trainable"])
    assert numbers == expected["n_trainable_params"]
    assert sum(p.numel() for p in model.parameters()) - numbers == expected["n_frozen_params"]
    report(name_of(lora_case), f"trainable: {variant}", 0, 0)


class Training:
    """The recorded steps repeated, with some parameters trained."""

    def __init__(self, case, trained):
        self.recorded = Recorded(case)
        self.model = self.recorded.model
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and (trained == "openpi_filter" or "lora_" in name))
        self.curve = json.loads((case / "curve.json").read_text())
        self.start = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        arrays = dict(np.load(GOLDEN / self.curve["batches"]))
        optimizer, self.log = self.optimizer(), []
        for step in range(self.curve["steps"]):
            prefix = f"batch{self.curve['pool_index'][step]}/"
            batch = read_batch({k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)})
            draws = {key: torch.from_numpy(arrays[key][step]) for key in ("noise", "time")}
            output = self.model(batch | draws)
            output.loss_sum.backward()
            done = optimizer.step(output.weight)
            loss = output.loss_sum.detach() / output.weight
            self.log.append([float(value) for value in (loss, done.grad_norm, done.lr)])

    def optimizer(self):
        settings, schedule = self.curve["optimizer"], self.curve["schedule"]
        optim = OptimConfig(
            lr=schedule["peak_lr"],
            min_lr=schedule["decay_lr"],
            warmup_steps=schedule["warmup_steps"],
            decay_steps=schedule["decay_steps"],
            betas=(settings["b1"], settings["b2"]),
            eps=settings["eps"],
            weight_decay=settings["weight_decay"],
            clip_grad=settings["clip_global_norm"],
        )
        trained = [TrainedParameter(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        return Optimizer(trained, optim, optim.lr_at, clip_grad=optim.clip_grad)

    def mean_loss(self):
        with torch.no_grad():
            return float(self.model.losses(self.recorded.batch).mean())


@pytest.mark.parametrize("trained", ["lora_only", "openpi_filter"])
def test_training_follows_the_recorded_run(lora_case, trained, report):
    run = Training(lora_case, trained)
    name, recorded = run.recorded.name, run.curve[trained]
    theirs = np.array([recorded[key] for key in ("loss", "grad_norm_before_clip", "lr")])
    loss, norm, lr = np.abs(np.array(run.log).T / theirs - 1)
    report(name, f"{trained}: loss, {len(loss)} steps", loss.max(), LOSSES)
    report(name, f"{trained}: gradient norm", norm.max(), NORM)
    report(name, f"{trained}: learning rate", lr.max(), 1e-6)
    after = abs(run.mean_loss() / recorded["mean_loss_on_inputs_after"] - 1)
    report(name, f"{trained}: loss afterwards", after, LOSSES)
    stored = load_file(lora_case / f"after10_{trained}_jax.safetensors")
    off = update = 0.0
    for own, _, value in from_arrays(run.model, run.recorded.lora, stored):
        off += float((run.model.get_parameter(own).detach() - value).square().sum())
        update += float((value - run.start[own]).square().sum())
    report(name, f"{trained}: change of the adapters", (off / update) ** 0.5, UPDATE)
    changes = change_norms(run)
    if trained == "openpi_filter":
        watched = {key for key in recorded["change_norms"] if not key.endswith("key/bias")}  # Its gradient is zero.
        for key in watched:
            assert changes[key] == pytest.approx(recorded["change_norms"][key], rel=2e-2, abs=1e-7), key
        slots = JAX.slots(run.model.dimensions)
        now = unpacked({n: p.detach() for n, p in run.model.named_parameters() if n in run.start}, run.model.dimensions)
        before = unpacked(run.start, run.model.dimensions)
        off = update = 0.0
        for own in (own for own in now if own in slots and slots[own].key in stored):
            value = slots[own].take(stored[slots[own].key])
            off += float((now[own] - value).square().sum())
            update += float((value - before[own]).square().sum())
        report(name, f"{trained}: change of the projections", (off / update) ** 0.5, UPDATE)
    else:
        assert not {key for key, change in changes.items() if change and "lora" not in key}


def change_norms(run):
    """The norm of each of the reference's arrays' change."""
    slots = JAX.slots(run.model.dimensions)
    now = {name: p.detach() for name, p in run.model.named_parameters()}
    changes = {name: now[name] - run.start[name] for name in now}
    squares = {}
    for own, change in unpacked(changes, run.model.dimensions).items():
        if own in slots:
            squares[slots[own].key] = squares.get(slots[own].key, 0.0) + float(change.square().sum())
    for key, value in as_arrays(run.model, run.recorded.lora, changes).items():
        squares[key] = float(value.square().sum())
    return {key: value**0.5 for key, value in squares.items()}


@pytest.fixture(scope="module")
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("held", ["params_f32", "frozen_bf16"])
def test_bf16_is_as_close_as_bf16_can_be(lora_case, held, mesh, report):
    theirs, exact = (dict(np.load(lora_case / name)) for name in ("outputs_lora_bf16.npz", "outputs_lora.npz"))
    recorded = Recorded(lora_case)
    model, seen = recorded.model, {}
    if held == "frozen_bf16":
        adapted = read_base(lora_case)
        lora = recorded.lora.model_copy(update={"base_dtype": "bf16"})
        add_openpi_lora(adapted, lora, matrix_names(adapted.dimensions))
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                parameter.copy_(model.get_parameter(name))
        assert {p.dtype for p in adapted.parameters() if not p.requires_grad} == {torch.bfloat16}
        model = adapted
    shard(model, mesh, compute_dtype=torch.bfloat16)
    model.action_out_proj.register_forward_hook(lambda *call: seen.update(v_t=call[-1]))
    model.expert_norm.register_forward_hook(lambda *call: seen.update(suffix_out=call[-1][0]))
    with torch.no_grad():
        losses = model(recorded.batch).sample_losses[:, 0]
        seen["sample_actions/steps4"] = None
        ours = {name: seen[name].float().numpy() for name in ("v_t", "suffix_out")}
        ours["sample_actions/steps4"] = model.sample_actions(recorded.batch, recorded.noise, 4).numpy()
    for name, value in ours.items():
        reference = theirs[f"{held}/{name}"]
        own = rms_distance(reference, exact[name])
        report(recorded.name, f"bf16, {held}: {name}", rms_distance(value, reference), max(1.25 * own, BF16))
    reference = theirs[f"{held}/loss"].sum(1)
    report(recorded.name, f"bf16, {held}: loss", rms_distance(losses.numpy(), reference), 0.05)


def test_initial_values_are_the_references(lora_case):
    """Both matrices normal(0.01), unlike in the usual LoRA: the first step differs from the policy without adapters."""
    model = read_base(lora_case)
    before = Original.of(model)
    add_openpi_lora(model, read_lora(lora_case), matrix_names(model.dimensions))
    adapters = find_adapters(before, model, lambda: "openpi")
    values = {n: adapters.initial_value(1, n, tuple(model.get_parameter(n).shape)) for n in adapters.owners}
    sample = read_config(lora_case)["published_init_sample"]
    for key, value in as_arrays(model, read_lora(lora_case), values).items():
        assert float(value.std()) == pytest.approx(sample[key]["std"], rel=0.12), key
        assert len(value) == 1 or not torch.equal(value[0], value[1])


REAL = GOLDEN / "lora" / "real_size_lora.json"


@pytest.mark.skipif(not REAL.is_file(), reason="this golden set has no real sizes")
@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_published_variants_have_these_adapters(kind, report):
    expected = json.loads(REAL.read_text())[kind]
    with torch.device("meta"):
        model = Pi0(Pi0Dimensions.of("base", pi05=kind == "pi05", action_dim=32, action_horizon=50))
        lora = OpenpiLoraConfig(convention="openpi")
        add_openpi_lora(model, lora, matrix_names(model.dimensions))
        arrays = as_arrays(model, lora, {n: p.detach() for n, p in model.named_parameters() if "lora_" in n})
    assert {key: list(value.shape) for key, value in arrays.items()} == {
        key: shape for key, (shape, _) in expected["lora_shapes"].items()
    }
    assert lora.scales == dict.fromkeys(EXPERTS, 1.0)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == expected["n_trainable"]
    assert sum(p.numel() for p in model.parameters()) - trained == expected["n_frozen"]
    report("lora/real_size_lora.json", f"{kind}: {len(arrays)} arrays", 0, 0)


def test_every_case_has_a_model():
    for case in sorted((GOLDEN / "lora").glob("pi*")):
        assert base_of(case)[1].is_file()


@pytest.fixture
def checkpoint(lora_case, tmp_path):
    """Base and adapters as openpi's trainer writes them: arrays in one OCDBT database."""
    tensorstore = pytest.importorskip("tensorstore")
    arrays = load_file(base_of(lora_case)[1]) | load_file(lora_case / "lora_jax.safetensors")
    folder = tmp_path / "checkpoint" / "params"
    folder.mkdir(parents=True)
    for key, value in arrays.items():
        kvstore = {"driver": "ocdbt", "base": f"file://{folder}/", "path": f"params.{key.replace('/', '.')}.value/"}
        spec = {"driver": "zarr", "kvstore": kvstore, "dtype": "float32", "create": True}
        tensorstore.open(spec, shape=list(value.shape)).result().write(value.numpy()).result()
    return folder.parent


def test_convert_merges_a_checkpoint_of_the_reference(lora_case, checkpoint, tmp_path, monkeypatch, report):
    recorded = Recorded(lora_case)
    dimensions, expected = recorded.model.dimensions, merged_weights(recorded.model)
    sizes = VariantSizes(dimensions.vocab_size, dimensions.vlm, dimensions.expert, dimensions.vision)
    monkeypatch.setitem(VARIANTS_OF_MODELS, "dummy", sizes)
    alphas = {one: recorded.lora.alpha_pattern[one] for one in EXPERTS}
    scaled = ["--lora-alpha", *map(str, alphas.values())]
    command = ["convert", str(checkpoint), "--output", str(tmp_path / "out"), *scaled]
    assert cli.main(command) == 0
    source = PublishedWeights(tmp_path / "out", dimensions)
    off = max(float((source.tensor(name) - value).abs().max()) for name, value in expected.items())
    report(recorded.name, "merged by rlinf convert", off, 1e-6)


def test_convert_scales_by_the_published_alphas_and_refuses_halves(lora_case, tmp_path):
    arrays = load_file(base_of(lora_case)[1]) | load_file(lora_case / "lora_jax.safetensors")
    save_file(arrays, tmp_path / "model.safetensors")
    files = open_files(tmp_path / "model.safetensors")
    key = "PaliGemma/llm/layers/attn/attn_vec_einsum_1/w"
    a, b = (arrays[f"{key[:-1]}lora_{kind}"] for kind in "ab")
    expected = arrays[key] + torch.einsum("lNHr,lMrD->lNHD", a, b)  # alpha = rank
    assert torch.allclose(MergedLora(files, Scaling({})).read(key), expected, atol=1e-5)
    save_file({k: v for k, v in arrays.items() if k != f"{key[:-1]}lora_b"}, tmp_path / "half.safetensors")
    with pytest.raises(UserError, match=r"attn_vec_einsum_1/lora_a without the array"):
        MergedLora(open_files(tmp_path / "half.safetensors"), Scaling({}))
