"""π0 and π0.5 against the JAX reference: outputs, gradients, sampling, weight layout."""

import json

import numpy as np
import pytest
import torch
from golden import GOLDEN, name_of
from pi0_case import max_distance, read_batch, read_model, without_absent
from safetensors.torch import load_file

from rlinf_plugins_openpi.model.dimensions import CAMERAS, Pi0Dimensions
from rlinf_plugins_openpi.model.parts import unpacked
from rlinf_plugins_openpi.model.pi0 import Pi0, time_features
from rlinf_plugins_openpi.weights.names import EMBEDDING, EMBEDDING_IN_FILES, UNUSED, published_names

TOKENS = 1e-5
TIME = 2e-5
VELOCITY = 1e-5
SAMPLES = 1e-4
GRADIENT = 2e-4
ONE_GRADIENT = 1e-3
"""A parameter's own: a small gradient carries the rounding of larger ones."""


class Recorded:
    """A case of `model/`, with our model run over its inputs."""

    def __init__(self, folder, report):
        self.name, self.folder, self._report = name_of(folder), folder, report
        self.model = read_model(folder)
        self.inputs = dict(np.load(folder / "inputs.npz"))
        self.outputs = dict(np.load(folder / "outputs.npz"))
        self.batch = read_batch(self.inputs)

    def compare(self, quantity, ours, tolerance):
        """Hold max|difference| / max|reference| to the tolerance."""
        self._report(self.name, quantity, max_distance(ours, self.outputs[quantity]), tolerance)

    def compare_rows(self, quantity, rows, tolerance):
        """As `compare`, of what the reference has for all tokens of the prefix and ours for the valid ones."""
        theirs = self.outputs[quantity][self.outputs["prefix_mask"]]
        self._report(self.name, quantity, max_distance(rows[: len(theirs)], theirs), tolerance)

    def x_t(self):
        t = self.batch["time"][:, None, None]
        return t * self.batch["noise"] + (1 - t) * self.batch["actions"]

    def embed(self):
        return self.model.embed_prefix(self.batch), self.model.embed_suffix(
            self.batch["state"], self.x_t(), self.batch["time"]
        )


@pytest.fixture
def recorded(model_case, report):
    return Recorded(model_case, report)


@torch.no_grad()
def test_image_tower(recorded):
    seen = {}
    tower = recorded.model.vision
    tower.patch_embedding.register_forward_hook(lambda *call: seen.update(vit_patch_embed=call[-1]))
    tower.head.norm.register_forward_hook(lambda *call: seen.update(vit_encoded=call[-1]))
    for key in recorded.outputs:
        quantity, _, camera = key.partition("/")
        if quantity in ("vit_patch_embed", "vit_encoded"):
            tower(recorded.batch["images"][:, CAMERAS.index(camera)])
            recorded.compare(key, seen[quantity], TOKENS)


@torch.no_grad()
def test_prefix_and_suffix(recorded):
    prefix, suffix = recorded.embed()
    mask = recorded.outputs["prefix_mask"]
    assert np.array_equal(prefix.packing.lengths, mask.sum(1))
    recorded.compare_rows("prefix_tokens", prefix.tokens, TOKENS)
    recorded.compare("x_t", recorded.x_t(), TOKENS)
    recorded.compare("u_t", recorded.batch["noise"] - recorded.batch["actions"], TOKENS)
    width = recorded.model.dimensions.expert.width
    recorded.compare("time_posemb", time_features(recorded.batch["time"], width), TIME)
    recorded.compare("suffix_tokens", suffix.tokens, TOKENS)
    assert (suffix.cond is not None) == ("adarms_cond" in recorded.outputs)
    if suffix.cond is not None:
        recorded.compare("adarms_cond", suffix.cond, TIME)


@torch.no_grad()
def test_who_sees_whom(recorded):
    _, suffix = recorded.embed()
    theirs, prefix_mask = recorded.outputs["attn_mask"], recorded.outputs["prefix_mask"]
    num_prefix, num_suffix = prefix_mask.shape[1], suffix.tokens.shape[1]
    ours = recorded.model.suffix_visible(torch.from_numpy(prefix_mask), num_suffix).expand(-1, num_suffix, -1)
    assert np.array_equal(ours, theirs[:, num_prefix:])
    seen_by_prefix = np.pad(prefix_mask, ((0, 0), (0, num_suffix)))[:, None] & prefix_mask[:, :, None]
    assert np.array_equal(seen_by_prefix, theirs[:, :num_prefix])


@torch.no_grad()
def test_joint_layers(recorded):
    prefix, suffix = recorded.embed()
    suffix_out = recorded.model.run(prefix, suffix)
    recorded.compare_rows("prefix_out", recorded.model.read(prefix), TOKENS)
    recorded.compare("suffix_out", suffix_out, TOKENS)
    recorded.compare("v_t", recorded.model.velocity(suffix_out), VELOCITY)
    recorded.compare("loss", recorded.model.losses(recorded.batch), VELOCITY)
    keys, values = recorded.model.prefill(prefix)[-1]
    last = len(recorded.model.layers) - 1
    recorded.compare_rows(f"kv_cache/k{last}", keys[prefix.packing.valid], TOKENS)
    recorded.compare_rows(f"kv_cache/v{last}", values[prefix.packing.valid], TOKENS)


def test_sampling(recorded):
    noise = torch.from_numpy(recorded.inputs["sample_noise"])
    steps = [key for key in recorded.outputs if key.startswith("sample_actions/steps")]
    assert steps
    for key in steps:
        sampled = recorded.model.sample_actions(recorded.batch, noise, int(key.removeprefix("sample_actions/steps")))
        recorded.compare(key, sampled, SAMPLES)
    velocity = noise - recorded.model.sample_actions(recorded.batch, noise, 1)
    recorded.compare("v_t_at_t1_on_sample_noise", velocity, VELOCITY)


def gradients(model, batch):
    """The mean loss and its gradient by parameter; parameters that do not reach the loss are left out."""
    model.zero_grad()
    output = model(batch)
    loss = output.loss_sum / output.weight
    loss.backward()
    reached = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), unpacked(reached, model.dimensions)


def relative_l2(ours, theirs):
    """Over all parameters, and by parameter; without the keys' biases in vision, whose true gradient is zero."""
    names = [name for name in theirs if not (name.startswith("vision.") and name.endswith("k_proj.bias"))]
    off = {name: float((ours[name] - theirs[name]).norm()) for name in names}
    size = {name: float(theirs[name].norm()) for name in names}
    total = np.linalg.norm(list(off.values())) / np.linalg.norm(list(size.values()))
    return float(total), {name: off[name] / size[name] for name in names}


def test_gradients(recorded, report):
    names = published_names(recorded.model.dimensions)
    theirs = load_file(recorded.folder / "grads_torch.safetensors")
    assert theirs.keys() == set(names.values())
    _, ours = gradients(recorded.model, recorded.batch)
    reach = {name for name, published in names.items() if theirs[published].any()}
    assert reach <= ours.keys()
    assert not any(ours[name].any() for name in ours.keys() - reach)
    total, each = relative_l2(ours, {name: theirs[names[name]] for name in reach})
    worst = max(each, key=each.__getitem__)
    report(recorded.name, "gradient", total, GRADIENT)
    report(recorded.name, f"gradient of {worst}", each[worst], ONE_GRADIENT)


@pytest.mark.parametrize(
    ("dtype", "loss_tolerance", "gradient_tolerance", "sample_tolerance"),
    [(torch.float32, 1e-6, 5e-6, 2e-5), (torch.float64, 1e-10, 1e-10, 1e-10)],
    ids=["float32", "float64"],
)
def test_leaving_out_what_is_absent_changes_nothing(
    recorded, report, dtype, loss_tolerance, gradient_tolerance, sample_tolerance
):
    model = recorded.model.to(dtype)
    padded = {key: value.to(dtype) if value.is_floating_point() else value for key, value in recorded.batch.items()}
    padded["image_mask"] = padded["image_mask"] & torch.tensor([True] * (len(CAMERAS) - 1) + [False])
    padded["image_mask"][:, 0] = True
    trimmed = without_absent(padded)
    assert trimmed["images"].shape[1] < len(CAMERAS)
    (loss, full), (trimmed_loss, lean) = gradients(model, padded), gradients(model, trimmed)
    total, _ = relative_l2(lean, full)
    noise = torch.from_numpy(recorded.inputs["sample_noise"]).to(dtype)
    samples = [model.sample_actions(batch, noise) for batch in (trimmed, padded)]
    case = f"{recorded.name}/without absent ({str(dtype).removeprefix('torch.')})"
    report(case, "loss", float((trimmed_loss - loss).abs() / loss), loss_tolerance)
    report(case, "gradient", total, gradient_tolerance)
    report(case, "samples", max_distance(samples[0], samples[1].numpy()), sample_tolerance)


LAYOUT = GOLDEN / "model" / "published_layout.json"


@pytest.mark.skipif(not LAYOUT.is_file(), reason="this golden set has no published layout")
@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_names_and_shapes_are_the_published_ones(kind, report):
    layout = {key: tuple(shape) for key, (shape, _) in json.loads(LAYOUT.read_text())[kind].items()}
    action_dim = layout["action_in_proj.weight"][1]
    with torch.device("meta"):
        model = Pi0(Pi0Dimensions.of("base", pi05=kind == "pi05", action_dim=action_dim, action_horizon=50))
    shapes = {name: tuple(p.shape) for name, p in unpacked(dict(model.named_parameters()), model.dimensions).items()}
    names = published_names(model.dimensions)
    assert shapes.keys() == names.keys()
    ours = {names[name]: shape for name, shape in shapes.items()}
    assert layout.pop(EMBEDDING_IN_FILES) == ours[EMBEDDING]
    assert layout.keys() - ours.keys() == UNUSED
    assert ours == {key: shape for key, shape in layout.items() if key not in UNUSED}
    report("model/published_layout.json", f"{kind}: {len(ours)} tensors", 0, 0)
