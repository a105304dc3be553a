"""Denoising steps share what they can, and a compiled step sees one shape per batch size: the same actions."""

import pytest
import torch
from small_pi0 import batch_of, build, with_packing
from varlen_on_cpu import packed_attention

from rlinf_core.torch_names import compiled_graphs
from rlinf_plugins_openpi.model.pi0 import euler_times

BOTH = ([[True, True]], [9])
ALL_DIFFERENT = ([[True, False], [True, True], [False, True], [False, False]], [3, 7, 1, 4])
PROMPTS = [([[True, True]], [length]) for length in (1, 3, 5, 8, 9)]


def as_published(model, batch, steps):
    """The reference's loop: every step embeds its time and its state, and runs both experts without a cache."""
    prefix, x_t = model.embed_prefix(batch), batch["noise"]
    for time in euler_times(steps):
        suffix = model.embed_suffix(batch["state"], x_t, x_t.new_full(x_t.shape[:1], time))
        x_t = x_t - model.velocity(model.run(prefix, suffix)) / steps
    return x_t


@pytest.mark.parametrize("packed", [False, True], ids=["grid", "packed"])
@pytest.mark.parametrize("pi05", [False, True], ids=["pi0", "pi05"])
def test_sharing_changes_nothing(pi05, packed):
    model, batch = build(pi05, torch.float64), batch_of(*ALL_DIFFERENT, dtype=torch.float64)
    with torch.no_grad():
        expected = as_published(model, batch, 4)
        if packed:
            with packed_attention():
                found = model.sample_actions(batch, batch["noise"], 4)
        else:
            found = model.sample_actions(batch, batch["noise"], 4)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.fixture
def no_graphs_yet():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("pi05", "packed"),
    [
        pytest.param(False, True, id="pi0, packed"),
        pytest.param(True, False, id="pi05, grid", marks=pytest.mark.slow),
        pytest.param(False, False, id="pi0, grid", marks=pytest.mark.slow),
        pytest.param(True, True, id="pi05, packed", marks=pytest.mark.slow),
    ],
)
def test_a_compiled_step_gives_the_same_actions(no_graphs_yet, pi05, packed):
    """What is compiled, without inductor: spread over slots, filled up, one graph."""
    model, batch = build(pi05, torch.float64), batch_of(*ALL_DIFFERENT, dtype=torch.float64)
    part = {name: value[:3] for name, value in batch.items()}
    with torch.inference_mode():
        expected = [model.sample_actions(one, one["noise"], 3) for one in (batch, part)]
        model.compile_sampling(backend="eager")
        model.compiled.slots = 64
        if packed:
            with packed_attention():
                found = [model.sample_actions(one, one["noise"], 3) for one in (batch, part)]
        else:
            found = [model.sample_actions(one, one["noise"], 3) for one in (batch, part)]
    for one, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(one, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("pi05", [pytest.param(False, id="pi0", marks=pytest.mark.slow), pytest.param(True, id="pi05")])
def test_requests_compile_nothing_after_the_largest(no_graphs_yet, pi05):
    model = build(pi05)
    model.compile_sampling(backend="eager")

    def sample(kind, steps=2, seed=1):
        batch = with_packing(batch_of(*kind, seed=seed), None)
        with torch.inference_mode():
            return model.sample_actions(batch, batch["noise"], steps)

    before = compiled_graphs()
    for size in (1, 2):
        sample((BOTH[0] * size, BOTH[1] * size))
    warm = compiled_graphs()
    assert warm - before == 2  # One for each batch size; all steps are the same graph.
    for seed, kind in enumerate(PROMPTS):
        sample(kind, steps=1 + seed, seed=seed)
    sample(([[True, True]] * 2, [2, 9]))
    assert compiled_graphs() == warm


@pytest.mark.slow  # Minutes of a C++ compiler.
@pytest.mark.parametrize("pi05", [False, True], ids=["pi0", "pi05"])
def test_inductor_gives_the_same_actions(no_graphs_yet, pi05):
    model, batch = build(pi05), batch_of(*BOTH)
    with torch.inference_mode():
        expected = model.sample_actions(batch, batch["noise"])
        model.compile_sampling()
        found = model.sample_actions(batch, batch["noise"])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
