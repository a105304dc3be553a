"""Weights from lerobot and RLinf: the layout is told by the names, and read as strictly as the published one."""

import pytest
import torch
from safetensors.torch import save_file
from tiny_pi0 import PI0, PI05, published_state, rlinf_state, shapes_of, state_of

from rlinf_core.errors import UserError
from rlinf_plugins_openpi.model.dimensions import Pi0Dimensions
from rlinf_plugins_openpi.model.parts import unpacked_shapes
from rlinf_plugins_openpi.model.pi0 import Pi0
from rlinf_plugins_openpi.weights.files import open_files
from rlinf_plugins_openpi.weights.names import EMBEDDING, EMBEDDING_IN_FILES, UNUSED
from rlinf_plugins_openpi.weights.shapes import table_shapes
from rlinf_plugins_openpi.weights.source import PublishedWeights

(HEAD,) = UNUSED
SIZES = [("base", False), ("base", True), ("dummy", False), ("dummy", True)]


@pytest.fixture(params=[PI0, PI05], ids=["pi0", "pi05"])
def dimensions(request):
    return request.param


def loaded(path, dimensions):
    source = PublishedWeights(path, dimensions)
    source.check(shapes_of(dimensions))
    return {name: source.tensor(name) for name in shapes_of(dimensions)}


def equal(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def complaint(path, dimensions):
    with pytest.raises(UserError) as error:
        loaded(path, dimensions)
    return str(error.value)


def with_heads(state):
    """As a whole state dict has it: the embedding, and token heads that training does not touch."""
    return state | {EMBEDDING_IN_FILES: state[EMBEDDING] + 1, HEAD: torch.zeros(16, 4)}


def wrapped(state, prefix):
    return {prefix + key: tensor for key, tensor in state.items()}


def save_pickle(state, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path)


def test_lerobot_saves_behind_a_prefix_and_unties_the_head(tmp_path, dimensions):
    save_file(wrapped(with_heads(published_state(dimensions)), "model."), tmp_path / "model.safetensors")
    assert equal(loaded(tmp_path, dimensions), state_of(dimensions))


def test_lerobot_may_have_kept_the_head_alone(tmp_path, dimensions):
    state = published_state(dimensions)
    state[EMBEDDING_IN_FILES] = state.pop(EMBEDDING)
    save_file(wrapped(state, "model."), tmp_path / "model.safetensors")
    assert equal(loaded(tmp_path, dimensions), state_of(dimensions))


def test_problems_are_named_as_the_file_names_them(tmp_path):
    state = wrapped(published_state(PI0), "model.")
    del state["model.state_proj.bias"]
    save_file(state | {"model.normalize.mean": torch.zeros(2)}, tmp_path / "model.safetensors")
    message = complaint(tmp_path, PI0)
    assert "missing: model.state_proj.bias [4]" in message
    assert "unexpected: model.normalize.mean [2]" in message
    assert "openpi's PyTorch layout with the prefix 'model.'" in message


@pytest.mark.parametrize("place", ["full_weights.pt", "actor/model_state_dict/full_weights.pt"])
def test_rlinf_saves_openpis_names_in_a_pickle(tmp_path, dimensions, place):
    save_pickle(with_heads(published_state(dimensions)), tmp_path / place)
    assert equal(loaded(tmp_path, dimensions), state_of(dimensions))


@pytest.mark.parametrize("prefix", ["", "model.", "_fsdp_wrapped_module.model."])
def test_rlinfs_own_port_joins_and_transposes(tmp_path, dimensions, prefix):
    save_pickle(wrapped(rlinf_state(dimensions), prefix), tmp_path / "model_state_dict" / "full_weights.pt")
    assert equal(loaded(tmp_path, dimensions), state_of(dimensions))


def test_rlinfs_own_port_is_read_as_strictly(tmp_path):
    state = rlinf_state(PI05)
    state["img.encoder.layers.0.attn.in_proj_weight"] = torch.zeros(16, 8)
    del state["llm.layers.1.mlps.1.w_gating"]
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, tmp_path / "model.safetensors")
    message = complaint(tmp_path, PI05)
    assert "1 missing, 0 unexpected, 1 misshapen" in message
    assert "img.encoder.layers.0.attn.in_proj_weight is [16, 8], the model has [24, 8]" in message
    assert "missing: llm.layers.1.mlps.1.w_gating [2, 4, 6]" in message


def test_only_tensors_are_unpickled(tmp_path):
    class Surprise:
        def __reduce__(self):
            return (exec, ("raise SystemExit('ran')",))

    save_pickle({"weights": Surprise()}, tmp_path / "full_weights.pt")
    with pytest.raises(UserError, match=r"full_weights\.pt is no file of plain tensors"):
        PublishedWeights(tmp_path, PI0)
    save_pickle({"model": published_state(PI0), "step": 3}, tmp_path / "full_weights.pt")
    with pytest.raises(UserError, match=r"it holds: model, step\. The weights are under 'model': run torch\.save"):
        PublishedWeights(tmp_path, PI0)
    (tmp_path / "full_weights.pt").write_text("nothing of the kind")
    with pytest.raises(UserError, match=r"full_weights\.pt is no file of plain tensors"):
        PublishedWeights(tmp_path, PI0)


def test_two_sets_in_one_folder_are_refused(tmp_path):
    save_pickle(published_state(PI0), tmp_path / "model_state_dict" / "full_weights.pt")
    save_file(published_state(PI0), tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"more than one set.*model\.safetensors, model_state_dict/full_weights\.pt"):
        PublishedWeights(tmp_path, PI0)


def test_unknown_and_mixed_layouts_say_what_was_found_and_what_is_known(tmp_path):
    save_file({"bert.encoder.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(
        UserError, match=r"1 tensors in an unknown layout: bert\.encoder\.weight.*paligemma_with_expert"
    ):
        PublishedWeights(tmp_path / "other.safetensors", PI0)
    both = published_state(PI0) | {"llm.embedder.embedding.weight": torch.zeros(16, 8)}
    save_file(both, tmp_path / "both.safetensors")
    with pytest.raises(UserError, match=r"more than one layout: .*RLinf's.*\(llm\.embedder.*openpi's.*\(paligemma"):
        PublishedWeights(tmp_path / "both.safetensors", PI0)


def test_a_message_has_twelve_lines_at_most_and_something_of_every_kind(tmp_path):
    state = published_state(PI05)
    few = {key: state[key] for key in [EMBEDDING, "time_mlp_in.bias"]} | {"action_out_proj.bias": torch.zeros(9)}
    save_file(few | {"surprise": torch.zeros(2)}, tmp_path / "model.safetensors")
    message = complaint(tmp_path, PI05).splitlines()
    assert f"{len(state) - 3} missing, 1 unexpected, 1 misshapen" in message[0]
    assert message[1] == "this looks like another action width: set policy.action_dim = 9"
    assert message[3].strip() == "missing: action_in_proj.weight [4, 4]"
    assert "  wrong shape: action_out_proj.bias is [9], the model has [4]" in message
    assert "  unexpected: surprise [2]" in message
    assert message[-1] == f"  and {len(state) - 3 - 6} more"
    assert len(message) == 12


HINTS = {  # What people name instead of weights -> what the message says.
    "run/checkpoints/500/pretrained_model/model.safetensors": r'weights: set policy\.weights = ".*/pretrained_model"',
    "exp/2000/model.safetensors": r'A folder inside holds weights: set policy\.weights = ".*/exp/2000"',
    "exp/params/manifest.ocdbt": r"run `rlinf convert .*/exp/params --output FOLDER`",
    "pytorch_model.bin": r'It holds pytorch_model\.bin: name the file, policy\.weights = ".*/pytorch_model\.bin"',
    "pytorch_model-00001-of-00002.bin": "pickles .* save them as safetensors",
    "pi05.safetensors": r'name the file, policy\.weights = ".*/pi05\.safetensors"',
    "adapter_config.json": r"adapters of PEFT .* for google/paligemma.* in policy\.lora\.weights",
}


@pytest.mark.parametrize("file", HINTS)
def test_what_is_there_instead_of_weights_is_named(tmp_path, file):
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text('{"base_model_name_or_path": "google/paligemma"}')
    with pytest.raises(UserError, match=rf"holds neither .*{HINTS[file]}"):
        open_files(tmp_path)


def test_the_newest_of_several_steps_is_named(tmp_path):
    for step in ("900", "4000", "30000"):
        (tmp_path / step / "assets").mkdir(parents=True)
        (tmp_path / step / "model.safetensors").touch()
    with pytest.raises(UserError, match=rf'the newest of 3 with weights: set policy\.weights = "{tmp_path}/30000"'):
        open_files(tmp_path)
    with pytest.raises(UserError, match=rf'The folder above holds weights: set policy\.weights = "{tmp_path}/900"'):
        open_files(tmp_path / "900" / "assets")


@pytest.mark.parametrize("dimensions", [Pi0Dimensions.of(v, pi05=p, action_dim=7, action_horizon=3) for v, p in SIZES])
def test_shapes_without_torch_are_the_models(dimensions):
    with torch.device("meta"):
        module = Pi0(dimensions)
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    assert table_shapes(dimensions) == unpacked_shapes(shapes, dimensions)


@pytest.mark.parametrize(
    ("change", "guess"),
    [
        (
            {"value_head.mlp.0.weight": torch.zeros(2)},
            "this looks like a reinforcement-learning checkpoint (value_head.",
        ),
        (
            {"paligemma_with_expert.paligemma.language_model.model.norm.weight": torch.zeros(2)},
            "this looks like lerobot before 0.4, which had other names",
        ),
        (
            {"normalize_inputs.buffer_observation_state.mean": torch.zeros(2)},
            "this looks like lerobot before 0.4, which kept statistics in the file",
        ),
        ({"action_in_proj.SCB": torch.zeros(2)}, "this looks like a quantised model (action_in_proj.SCB)"),
        ({"action_in_proj.lora_A.weight": torch.zeros(2)}, "this looks like weights with unmerged LoRA adapters"),
    ],
)
def test_what_others_add_is_refused_with_a_guess(tmp_path, change, guess):
    save_file(published_state(PI0) | change, tmp_path / "model.safetensors")
    assert guess in complaint(tmp_path, PI0)


def test_other_sizes_are_guessed(tmp_path):
    save_file(published_state(PI0), tmp_path / "model.safetensors")
    wider = Pi0Dimensions(False, 7, 3, 16, PI0.vlm, PI0.expert, PI0.vision)
    assert "this looks like another action width: set policy.action_dim = 4" in complaint(tmp_path, wider)
    dummy = Pi0Dimensions.of("dummy", pi05=False, action_dim=4, action_horizon=3)
    files = open_files(tmp_path)
    files.shapes[EMBEDDING] = (257_152, 2048)
    with pytest.raises(UserError, match=r'this looks like another size: set policy\.variant = "base"'):
        PublishedWeights(tmp_path, dummy, files).check(shapes_of(dummy))


def test_weights_are_floating_point_numbers(tmp_path):
    state = published_state(PI0)
    save_file(state | {"state_proj.bias": torch.zeros(4, dtype=torch.int8)}, tmp_path / "model.safetensors")
    assert "wrong dtype: state_proj.bias is I8" in complaint(tmp_path, PI0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_the_installed_lerobots_modules_are_of_the_published_layout(tmp_path, kind):
    """Real size, on the meta device: every name and shape of lerobot's own state dict."""
    modeling = pytest.importorskip(f"lerobot.policies.{kind}.modeling_{kind}")
    from rlinf_plugins_openpi.model.pi0 import Pi0

    policies = {"pi0": ("PI0Config", "PI0Pytorch"), "pi05": ("PI05Config", "PI05Pytorch")}
    config, module = (getattr(modeling, name) for name in policies[kind])
    with torch.device("meta"):
        theirs = module(config(device="cpu")).state_dict()
        ours = Pi0(Pi0Dimensions.of("base", pi05=kind == "pi05", action_dim=32, action_horizon=50))

    class Files:
        shapes = {f"model.{key}": tuple(tensor.shape) for key, tensor in theirs.items()}
        dtypes = dict.fromkeys(shapes, "F32")

    source = PublishedWeights("lerobot", ours.dimensions, Files())
    source.check({name: tuple(parameter.shape) for name, parameter in ours.named_parameters()})
