"""The default layout of weights: what is saved is read, under published names, and damage is one message."""

import pytest
import torch
from arm_policy import ArmPolicy
from damaging import complaint, damaged_bytes, examples
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from rlinf_core import UserError

TENSORS = {"enter.weight": torch.arange(6.0).view(3, 2), "scale": torch.tensor(2.0, dtype=torch.bfloat16)}
SHAPES = {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}


class Packed(ArmPolicy):
    """Three published rows are one parameter."""

    def published_name(self, name):
        return f"net.{name}"

    def published_parts(self, name):
        return {"net.q": 2, "net.k": 1} if name == "enter.weight" else {}


def test_tensors_are_saved_under_published_names_and_read_by_the_modules(tmp_path):
    Packed().save_weights(TENSORS, tmp_path)
    file = tmp_path / "model.safetensors"
    assert {name: tuple(tensor.shape) for name, tensor in load_file(file).items()} == {
        "net.q": (2, 2),
        "net.k": (1, 2),
        "net.scale": (),
    }
    for weights in (tmp_path, file):
        source = Packed(weights=str(weights)).open_weights()
        source.check(SHAPES)
        for name, tensor in TENSORS.items():
            read = source.tensor(name)
            assert read.dtype == tensor.dtype
            assert torch.equal(read, tensor)


def test_every_difference_is_named(tmp_path):
    ArmPolicy().save_weights(TENSORS, tmp_path)
    source = ArmPolicy(weights=str(tmp_path)).open_weights()
    with pytest.raises(UserError) as caught:
        source.check({"enter.weight": (3, 4), "leave.weight": (1,)})
    assert str(caught.value) == (
        f"policy.weights: {tmp_path / 'model.safetensors'} does not match the model: it lacks leave.weight; "
        "it has unexpected scale; of another shape: enter.weight is [3, 2] instead of [3, 4]"
    )
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"policy\.weights: there is no file .*/empty/model\.safetensors"):
        ArmPolicy(weights=str(tmp_path / "empty")).open_weights()


def test_damaged_files(tmp_path):
    ArmPolicy().save_weights(TENSORS, tmp_path)
    whole, path = (tmp_path / "model.safetensors").read_bytes(), tmp_path / "damaged.safetensors"

    def read():
        source = ArmPolicy(weights=str(path)).open_weights()
        source.check(SHAPES)
        return [source.tensor(name) for name in SHAPES]

    @examples(20)
    @given(st.data())
    def run(data):
        path.write_bytes(data.draw(damaged_bytes(whole)))
        complaint(read, path)

    run()
