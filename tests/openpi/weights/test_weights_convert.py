"""`rlinf convert`: from every layout to the published one, whole or not at all."""

import errno
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_pi0 import PI0, PI05, published_state, rlinf_state, shapes_of, state_of

from rlinf_core import cli
from rlinf_core.errors import UserError
from rlinf_plugins_openpi.model import dimensions as sizes
from rlinf_plugins_openpi.model.parts import unpacked
from rlinf_plugins_openpi.weights.convert import convert
from rlinf_plugins_openpi.weights.layouts import JAX
from rlinf_plugins_openpi.weights.names import EMBEDDING, EMBEDDING_IN_FILES, UNUSED
from rlinf_plugins_openpi.weights.saving import Entry, write_safetensors
from rlinf_plugins_openpi.weights.source import PublishedWeights

ORBAX = Path(__file__).parent / "orbax"
"""π0.5 of `tiny_pi0`, saved by orbax 0.11.1 (openpi's) under JAX 0.5.3 as openpi's training does: `params.….value`.
Values are drawn from the names, see `recorded`; scales are in bfloat16. What orbax notes for itself is left out."""
(HEAD,) = UNUSED


@pytest.fixture(autouse=True)
def _tiny_variant(monkeypatch):
    tiny = sizes.VariantSizes(PI0.vocab_size, PI0.vlm, PI0.expert, PI0.vision)
    monkeypatch.setitem(sizes.VARIANTS, "tiny", tiny)


def recorded(name, shape):
    """The array of a name in the recorded checkpoint."""
    values = np.random.default_rng(zlib.crc32(name.encode())).integers(-64, 64, shape).astype(np.float32) / 32
    return torch.from_numpy(values).to(torch.bfloat16 if name.endswith("scale") else torch.float32)


def published_file(dimensions):
    """What a converted file holds."""
    state = published_state(dimensions)
    state[EMBEDDING_IN_FILES] = state.pop(EMBEDDING)
    return state | {HEAD: torch.zeros(dimensions.vocab_size, dimensions.expert.width)}


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(
        ours[key].dtype == theirs[key].dtype and torch.equal(ours[key], theirs[key]) for key in theirs
    )


@pytest.mark.parametrize("dimensions", [PI0, PI05], ids=["pi0", "pi05"])
def test_other_layouts_become_the_published_file(tmp_path, dimensions):
    sources = {
        "lerobot.safetensors": {f"model.{key}": tensor for key, tensor in published_state(dimensions).items()},
        "rlinf.safetensors": rlinf_state(dimensions),
    }
    for name, state in sources.items():
        save_file({key: tensor.contiguous() for key, tensor in state.items()}, tmp_path / name)
        done = convert(str(tmp_path / name), tmp_path / "out" / name)
        assert same(load_file(done.path), published_file(dimensions))
        assert done.dimensions.pi05 == dimensions.pi05
        assert [file.name for file in (tmp_path / "out" / name).iterdir()] == ["model.safetensors"]


def test_every_tensor_gets_the_dtype_asked_for(tmp_path):
    state = published_state(PI0)
    state["state_proj.bias"] = state["state_proj.bias"].bfloat16()
    save_file(state, tmp_path / "mixed.safetensors")
    kept, bf16, fp32 = (
        load_file(convert(str(tmp_path / "mixed.safetensors"), tmp_path / f"out-{dtype}", dtype).path)
        for dtype in (None, "bf16", "fp32")
    )
    assert {key for key, tensor in kept.items() if tensor.dtype == torch.bfloat16} == {"state_proj.bias"}
    assert same(bf16, {key: tensor.bfloat16() for key, tensor in kept.items()})
    assert same(fp32, {key: tensor.float() for key, tensor in kept.items()})


def test_the_command_says_what_it_found_and_wrote(tmp_path, capsys):
    save_file(published_state(PI05), tmp_path / "model.safetensors")
    output = tmp_path / "out"
    assert cli.main(["convert", str(tmp_path / "model.safetensors"), "--output", str(output), "--dtype", "bf16"]) == 0
    printed = capsys.readouterr().out
    assert "π0.5 in openpi's PyTorch layout" in printed
    assert str(output / "model.safetensors") in printed
    assert cli.main(["convert", str(tmp_path), "--output", str(output)]) == 2
    assert "is already there" in capsys.readouterr().err


def test_nothing_is_left_of_a_source_that_does_not_fit(tmp_path):
    state = published_state(PI0)
    del state["state_proj.bias"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"missing: state_proj\.bias"):
        convert(str(tmp_path), tmp_path / "out")
    del state["action_out_proj.bias"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"holds no action_out_proj: it is neither π0 nor π0\.5"):
        convert(str(tmp_path), tmp_path / "out")
    state = published_state(PI0) | {EMBEDDING: torch.zeros(17, 8)}
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"embeds its vocabulary as \[17, 8\]; the variants have .*\[16, 8\] \(tiny\)"):
        convert(str(tmp_path), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_appears_when_it_is_whole(tmp_path):
    path = tmp_path / "model.safetensors"
    entries = {"a": Entry("F32", (2,)), "b": Entry("BF16", (3,))}
    with pytest.raises(ValueError, match=r"no tensors for \['b'\]"):
        write_safetensors(path, entries, [("a", torch.ones(2))])
    with pytest.raises(ValueError, match=r"b \[4\] is not to be written"):
        write_safetensors(path, entries, [("b", torch.ones(4))])
    with pytest.raises(UserError, match=r"needs 4000000000\.0 GB"):
        write_safetensors(path, {"a": Entry("F32", (10**18,))}, [])
    assert not [*tmp_path.iterdir()]
    write_safetensors(path, entries, [("b", torch.arange(3.0)), ("a", torch.ones(2))])
    assert same(load_file(path), {"a": torch.ones(2), "b": torch.arange(3.0).bfloat16()})


def test_a_disk_that_fails_in_the_middle_is_one_message(tmp_path, monkeypatch):
    save_file(published_file(PI0), tmp_path / "model.safetensors")

    def fail(descriptor):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("rlinf_plugins_openpi.weights.saving.os.fsync", fail)
    with pytest.raises(UserError, match=r"out cannot be written: Input/output error. Name another folder"):
        convert(str(tmp_path), tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_jax_parameters_are_read_from_an_orbax_checkpoint(tmp_path):
    pytest.importorskip("tensorstore", reason="the extra rlinf-plugins-openpi[jax] is not installed")
    done = convert(str(ORBAX), tmp_path)
    written = PublishedWeights(tmp_path, PI05)
    written.check(shapes_of(PI05))
    shapes = {name: tuple(tensor.shape) for name, tensor in unpacked(state_of(PI05), PI05).items()}
    assert done.layout.layout is JAX
    for name, slot in JAX.slots(PI05).items():
        ours, theirs = written.tensor(name), slot.take(recorded(slot.key, slot.stored_shape(shapes[name])))
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


def test_jax_parameters_point_to_the_command(tmp_path):
    with pytest.raises(UserError, match=r"holds openpi's JAX parameters: convert them with `rlinf convert"):
        PublishedWeights(ORBAX, PI05)


def test_tensorstore_is_named_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorstore", None)
    with pytest.raises(UserError, match=r"pip install 'rlinf-plugins-openpi\[jax\]'"):
        convert(str(ORBAX), tmp_path)
