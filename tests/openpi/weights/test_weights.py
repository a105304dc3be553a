"""Published weights: one table both ways, read strictly, every complaint named."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_pi0 import PI0, PI05, published_state, shapes_of, state_of

from rlinf_core.errors import UserError
from rlinf_plugins_openpi.model.parts import unpacked
from rlinf_plugins_openpi.weights.names import EMBEDDING, EMBEDDING_IN_FILES, UNUSED, published_names
from rlinf_plugins_openpi.weights.saving import save_published
from rlinf_plugins_openpi.weights.source import PublishedWeights

STATE_PROJ = "state_proj.weight"


@pytest.fixture(params=[PI0, PI05], ids=["pi0", "pi05"])
def dimensions(request):
    return request.param


@pytest.fixture
def pi0_dimensions():
    return PI0


@pytest.fixture
def published():
    """Published names -> tensors, to be damaged and saved."""
    return published_state(PI0)


def complaint(path, dimensions):
    with pytest.raises(UserError) as error:
        PublishedWeights(path, dimensions).check(shapes_of(dimensions))
    return str(error.value)


def test_saved_weights_come_back(tmp_path, dimensions):
    state = state_of(dimensions)
    save_published(state, tmp_path / "model.safetensors", dimensions)
    source = PublishedWeights(tmp_path, dimensions)
    source.check(shapes_of(dimensions))
    assert all(torch.equal(source.tensor(name), tensor) for name, tensor in state.items())


def test_saved_embedding_is_where_published_files_have_it(tmp_path, pi0_dimensions):
    file = tmp_path / "model.safetensors"
    save_published(state_of(pi0_dimensions), file, pi0_dimensions)
    with safe_open(file, framework="pt") as saved:
        keys = set(saved.keys())
        assert EMBEDDING_IN_FILES in keys
        assert EMBEDDING not in keys
        assert saved.metadata()[EMBEDDING] == EMBEDDING_IN_FILES
        assert keys >= UNUSED
        (head,) = UNUSED
        assert saved.get_tensor(head).shape == (16, 4)
        assert not saved.get_tensor(head).any()


def test_incomplete_state_is_not_saved(tmp_path, pi0_dimensions):
    state = state_of(pi0_dimensions)
    del state[STATE_PROJ]
    with pytest.raises(ValueError, match=STATE_PROJ):
        save_published(state, tmp_path / "model.safetensors", pi0_dimensions)


def test_files_keep_their_dtype(tmp_path, published, pi0_dimensions):
    save_file({key: tensor.bfloat16() for key, tensor in published.items()}, tmp_path / "model.safetensors")
    assert PublishedWeights(tmp_path, pi0_dimensions).tensor(STATE_PROJ).dtype == torch.bfloat16


def test_shards_are_found_through_their_index(tmp_path, published, pi0_dimensions):
    keys = sorted(published)
    for number, part in enumerate((keys[::2], keys[1::2])):
        save_file({key: published[key] for key in part}, tmp_path / f"part-{number}.safetensors")
    files = {key: f"part-{number}.safetensors" for number in (0, 1) for key in keys[number::2]}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": files}))
    source = PublishedWeights(tmp_path, pi0_dimensions)
    source.check(shapes_of(pi0_dimensions))
    assert torch.equal(source.tensor(STATE_PROJ), published[STATE_PROJ])
    (tmp_path / "part-1.safetensors").unlink()
    with pytest.raises(UserError, match=r"names shards that are not there: part-1\.safetensors"):
        PublishedWeights(tmp_path, pi0_dimensions)


def test_every_problem_is_named_at_once(tmp_path, published, pi0_dimensions):
    file = tmp_path / "some.safetensors"
    del published["action_out_proj.bias"]
    published[STATE_PROJ] = torch.zeros(4, 5)
    published["surprise"] = torch.zeros(2)
    save_file(published, file)
    message = complaint(file, pi0_dimensions)
    assert str(file) in message
    assert "missing: action_out_proj.bias [4]" in message
    assert f"wrong shape: {STATE_PROJ} is [4, 5], the model has [4, 4]" in message
    assert "unexpected: surprise [2]" in message


def test_pi05_weights_are_not_pi0_weights(tmp_path, pi0_dimensions):
    save_published(state_of(PI05), tmp_path / "model.safetensors", PI05)
    message = complaint(tmp_path, pi0_dimensions)
    assert f"missing: {STATE_PROJ}" in message
    assert "unexpected: time_mlp_in.weight" in message
    assert 'this looks like π0.5: set policy.type = "pi05"' in message


def test_embedding_may_have_either_name_or_both_if_equal(tmp_path, published, pi0_dimensions):
    file, embedding = tmp_path / "model.safetensors", published.pop(EMBEDDING)
    for names in ((EMBEDDING,), (EMBEDDING_IN_FILES,), (EMBEDDING, EMBEDDING_IN_FILES)):
        save_file(published | {name: embedding.clone() for name in names}, file)
        source = PublishedWeights(file, pi0_dimensions)
        source.check(shapes_of(pi0_dimensions))
        assert torch.equal(source.tensor("embedding.weight"), embedding)
    save_file(published | {EMBEDDING: embedding, EMBEDDING_IN_FILES: embedding + 1}, file)
    assert f"ambiguous: {EMBEDDING} and {EMBEDDING_IN_FILES}" in complaint(file, pi0_dimensions)


def test_an_embedding_of_another_vocabulary_is_named(tmp_path, published, pi0_dimensions):
    published[EMBEDDING_IN_FILES] = torch.zeros(17, published.pop(EMBEDDING).shape[1])
    save_file(published, tmp_path / "model.safetensors")
    assert f"wrong shape: {EMBEDDING_IN_FILES} is [17, 8]" in complaint(tmp_path, pi0_dimensions)


def test_the_experts_unused_head_is_let_pass(tmp_path, published, pi0_dimensions):
    published["paligemma_with_expert.gemma_expert.lm_head.weight"] = torch.zeros(16, 8)
    save_file(published, tmp_path / "model.safetensors")
    PublishedWeights(tmp_path, pi0_dimensions).check(shapes_of(pi0_dimensions))


def test_nothing_there_says_what_was_looked_for(tmp_path, pi0_dimensions):
    with pytest.raises(UserError, match=r"there is no file or folder .*absent"):
        PublishedWeights(tmp_path / "absent", pi0_dimensions)
    with pytest.raises(UserError, match=r"holds neither model\.safetensors nor model\.safetensors\.index\.json"):
        PublishedWeights(tmp_path, pi0_dimensions)


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json"])
def test_a_broken_file_is_named(tmp_path, pi0_dimensions, name):
    (tmp_path / name).write_text("not what it says")
    with pytest.raises(UserError, match=name):
        PublishedWeights(tmp_path, pi0_dimensions)


def test_names_are_one_to_one(dimensions):
    names = published_names(dimensions)
    assert len(set(names.values())) == len(names)
    assert names.keys() == unpacked(state_of(dimensions), dimensions).keys()
