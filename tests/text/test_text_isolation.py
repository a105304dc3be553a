"""Texts of a batch do not affect one another, or the architecture is refused with the layer that would let them."""

import re

import pytest
import torch
from distributions import ROOT
from tiny_text import SIZES, tiny_policy, with_values

from rlinf_core import UserError
from rlinf_plugins_text.model import isolation
from rlinf_plugins_text.model.isolation import check_isolation

EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}
CHUNKED = {
    "model_type": "llama4_text",
    **SIZES,
    "attention_chunk_size": 40,
    "num_local_experts": 1,
    "intermediate_size_mlp": 48,
    "interleave_moe_layer_step": 1,
    "layer_types": ["chunked_attention", "full_attention"],
    "no_rope_layers": [1, 0],
}
LEAKING = {
    "lfm2": ({"layer_types": ["conv", "full_attention"]}, r"model\.layers\.0\.conv \(Lfm2ShortConv\)"),
    "lfm2_moe": (
        {**EXPERTS, "layer_types": ["full_attention", "conv"], "num_dense_layers": 2},
        r"model\.layers\.1\.conv \(Lfm2MoeShortConv\)",
    ),
    "minimax": (
        {"layer_types": ["full_attention", "linear_attention"], "num_local_experts": 1, "num_experts_per_tok": 1},
        r"model\.layers\.1\.self_attn \(MiniMaxLightningAttention\)",
    ),
    "granitemoehybrid": (
        {**MAMBA, "layer_types": ["mamba", "attention"], "num_local_experts": 0, "shared_intermediate_size": 48},
        r"model\.layers\.0\.mamba \(GraniteMoeHybridMambaLayer\)",
    ),
}


def build(table, **settings):
    with torch.device("meta"):
        return tiny_policy(config=table, max_length=64, **settings).build()


@pytest.mark.parametrize("kind", LEAKING)
def test_layers_that_mix_texts_by_other_means_are_refused(kind):
    more, layer = LEAKING[kind]
    table = {"model_type": kind, **SIZES, "vocab_size": 512, **more}
    with pytest.raises(UserError, match=rf'{layer} would let texts of a batch see .* policy.attention = "padded"'):
        build(table)
    build(table, attention="padded")


def test_the_same_architecture_without_such_layers_is_accepted():
    """Granite 4 has models with attention only."""
    more, _ = LEAKING["granitemoehybrid"]
    build({"model_type": "granitemoehybrid", **SIZES, "vocab_size": 512, **more, "layer_types": ["attention"] * 2})


def test_masks_of_an_architecture_are_refused_where_texts_outgrow_them():
    with pytest.raises(UserError, match=r"layers\.0\.self_attn \(Llama4TextAttention\) would compute something else"):
        check_isolation(CHUNKED, documents=True, max_length=64)
    check_isolation(CHUNKED, documents=True, max_length=40)


def test_attention_that_does_not_go_through_transformers_is_named():
    with pytest.raises(UserError, match="GPTNeoForCausalLM uses its own attention"):
        check_isolation({"model_type": "gpt_neo"}, documents=True, max_length=64)


def test_models_that_see_what_follows_are_refused():
    table = {"model_type": "bert", "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
    for documents in (True, False):
        with pytest.raises(UserError, match=r"bert\.encoder\.layer\.0\.attention \(BertAttention\)"):
            check_isolation(table, documents=documents, max_length=64)
    check_isolation(table | {"is_decoder": True}, documents=False, max_length=64)


def test_frequencies_that_follow_the_longest_text_are_refused():
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    table = {"model_type": "llama", **SIZES, "max_position_embeddings": 32, "rope_scaling": rope}
    with pytest.raises(UserError, match=r"'dynamic'.* Set policy\.max_length = 32 or less"):
        check_isolation(table, documents=True, max_length=64)
    check_isolation(table, documents=True, max_length=32)


def test_buffers_that_an_architecture_does_not_initialise_are_refused():
    with pytest.raises(UserError, match=r"ApertusForCausalLM does not initialise model\.layers\.0\.mlp\.act_fn\.beta"):
        with_values(tiny_policy(config={"model_type": "apertus", **SIZES, "vocab_size": 512}))


def test_an_architecture_that_cannot_be_tried_is_refused():
    table = {"model_type": "deepseek_v2", "topk_method": "greedy", "num_experts_per_tok": None}
    with pytest.raises(UserError, match="a small model of its kind cannot be tried"):
        check_isolation(table, documents=True, max_length=64)


# Families whose config has no default that runs.
COMPLETE = {
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128, "num_experts": 4, "moe_topk": 2},
    "ministral": {"head_dim": 128},
    "lfm2": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
}


@pytest.mark.slow
def test_the_families_in_the_documentation(monkeypatch):
    """Every causal language model of the installed transformers is tried; the page lists what is accepted."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    monkeypatch.setattr(isolation, "KNOWN", frozenset())
    accepted = set()
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            check_isolation({"model_type": kind, **COMPLETE.get(kind, {})}, documents=True, max_length=2048)
            accepted.add(kind)
        except UserError as error:
            print(kind, error)
    page = (ROOT / "docs" / "text.md").read_text(encoding="utf-8")
    [listed] = re.findall(r"<!-- accepted as documents -->\n(.*?)\n\n", page, re.DOTALL)
    assert set(re.findall(r"`([\w-]+)`", listed)) == accepted
