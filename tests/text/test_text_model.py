"""The text policy computes what transformers computes: loss, gradients, packs, windows, tied heads, generation."""

import subprocess
import sys
from types import SimpleNamespace

import low_rank
import pytest
import torch
from tiny_text import QWEN3, SIZES, sample, some_tokens, tiny_policy, with_values
from transformers import AutoModelForCausalLM

from rlinf_core import UserError
from rlinf_core.testing import check_policy
from rlinf_core.training.state.build import initial_value
from rlinf_plugins_text.model.cross_entropy import HeadShape, linear_cross_entropy
from rlinf_plugins_text.weights import model_config

FAMILIES = {
    "qwen3": QWEN3,
    "llama": {"model_type": "llama", **SIZES},
    "gemma": {"model_type": "gemma", **SIZES},
    "gemma2": {"model_type": "gemma2", **SIZES, "sliding_window": 5, "attn_logit_softcapping": 2.0},
    "gemma3": {
        "model_type": "gemma3_text",
        **SIZES,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "mistral": {"model_type": "mistral", **SIZES, "sliding_window": 5},
    "granite": {"model_type": "granite", **SIZES, "logits_scaling": 3.0},
    "cohere": {"model_type": "cohere", **SIZES},
    "mixtral, whose logits are its own": {"model_type": "mixtral", **SIZES, "num_local_experts": 2},
}
TEXTS = [some_tokens(length, seed=length) for length in (14, 9, 11)]


def reference(policy, module):
    """transformers' own model with the same numbers, its own attention and its own loss."""
    settings = model_config(policy.model_table())
    model = AutoModelForCausalLM.from_config(settings, dtype=torch.float32, attn_implementation="eager")
    model.load_state_dict(module.lm.model.state_dict())
    return model.train()


def gradients(module):
    return {name.removeprefix("lm.model."): p.grad for name, p in module.named_parameters()}


def assert_same_gradients(found, expected):
    """All of them as one vector to 1e-6, and no parameter for itself far off."""
    assert found.keys() == expected.keys()
    apart = sum(float((found[name] - g).double().square().sum()) for name, g in expected.items())
    assert apart <= 1e-12 * sum(float(g.double().square().sum()) for g in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))


def losses_of_tokens(module, policy, *texts):
    inputs, tokens, predicting = module.lm._laid_out(policy.collate([sample(*texts)]))
    with torch.no_grad():
        logits = module.lm.model(**inputs, use_cache=False).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="none")[predicting]


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_transformers(family):
    policy = tiny_policy(config=FAMILIES[family] | {"vocab_size": 512}, max_length=64)
    module = with_values(policy)
    model = reference(policy, module)
    total, words = 0.0, 0
    for text in TEXTS:
        tokens = torch.tensor([text])
        labels = tokens.clone()
        labels[:, :2] = -100
        counted = len(text) - 2
        loss = model(input_ids=tokens, labels=labels).loss * counted
        loss.backward()
        total, words = total + float(loss.detach()), words + counted
    out = module(policy.collate([sample(text) for text in TEXTS]))
    out.loss_sum.backward()
    assert float(out.weight) == words
    assert float(out.loss_sum.detach()) == pytest.approx(total, rel=1e-6)
    assert_same_gradients(gradients(module), gradients(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pack_has_the_loss_of_its_texts(family):
    policy = tiny_policy(config=FAMILIES[family] | {"vocab_size": 512}, max_length=64, packing=True)
    module = with_values(policy)
    losses = {}
    for name, samples in {"apart": [sample(text) for text in TEXTS], "packed": [sample(*TEXTS)]}.items():
        for parameter in module.parameters():
            parameter.grad = None
        out = module(policy.collate(samples))
        out.loss_sum.backward()
        losses[name] = out, gradients(module)
    (apart, expected), (packed, found) = losses.values()
    assert float(packed.weight) == float(apart.weight)
    assert float((packed.loss_sum / packed.weight).detach()) == pytest.approx(
        float((apart.loss_sum / apart.weight).detach()), abs=1e-6
    )
    assert_same_gradients(found, expected)
    apart, packed = (
        torch.cat([losses_of_tokens(module, policy, *texts) for texts in samples])
        for samples in ([[text] for text in TEXTS], [TEXTS])
    )
    torch.testing.assert_close(packed, apart, rtol=0, atol=1e-6)


def test_what_a_text_says_changes_nothing_in_its_neighbours():
    """Token by token: the logits of a pack's second text do not depend on the first."""
    policy = tiny_policy(max_length=64, packing=True)
    module = with_values(policy)
    other = some_tokens(len(TEXTS[0]), seed=99)
    hidden = []
    for first in (TEXTS[0], other):
        inputs, _, _ = module.lm._laid_out(policy.collate([sample(first, TEXTS[1])]))
        hidden.append(module.lm.model.base_model(**inputs, use_cache=False).last_hidden_state[0])
    alone, _, _ = module.lm._laid_out(policy.collate([sample(TEXTS[1])]))
    expected = module.lm.model.base_model(**alone, use_cache=False).last_hidden_state[0]
    begin = len(other)
    assert not torch.allclose(hidden[0][:begin], hidden[1][:begin])
    assert torch.equal(hidden[0][begin:], hidden[1][begin:])
    torch.testing.assert_close(hidden[0][begin:], expected, rtol=0, atol=1e-6)


def test_padding_that_stays_changes_nothing():
    """As on CUDA, where padding is a document of its own."""
    policy = tiny_policy(max_length=64)
    module = with_values(policy)
    batch = policy.collate([sample(text) for text in TEXTS])
    hidden = []
    for keep in (False, True):
        inputs, _, predicting = module.lm._laid_out(batch, keep_padding=keep)
        hidden.append(module.lm.model.base_model(**inputs, use_cache=False).last_hidden_state[0][predicting])
    torch.testing.assert_close(hidden[0], hidden[1], rtol=0, atol=1e-6)


def test_padded_attention_has_the_same_loss():
    policies = [tiny_policy(max_length=64, attention=attention) for attention in ("documents", "padded")]
    losses = [float(with_values(p)(p.collate([sample(text) for text in TEXTS])).loss_sum) for p in policies]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_models_without_attention_are_refused_unless_padded():
    table = {"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
    with pytest.raises(UserError, match='attention = "padded"'), torch.device("meta"):
        tiny_policy(config=table).build()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"hiden_size": 130}, "qwen3 has no 'hiden_size'; did you mean 'hidden_size'"),
        ({"hidden_size": "big"}, "policy.config.*'hidden_size' expected int, got str"),
        ({"num_key_value_heads": 0}, "policy.config.*ZeroDivisionError"),
        ({"model_type": "qwenn"}, "no model_type 'qwenn'; did you mean '.{0,60}$"),
        ({"model_type": "vit"}, "'vit' is not a causal language model"),
    ],
)
def test_settings_of_the_model_that_cannot_be_are_refused(change, says):
    with pytest.raises(UserError, match=says), torch.device("meta"):
        tiny_policy(config=QWEN3 | change).build()


def test_older_names_and_keys_that_only_the_code_reads_are_known():
    table = {"model_type": "cohere", **SIZES, "rope_theta": 5000.0}
    with torch.device("meta"):
        module = tiny_policy(config=table).build()
    assert module.lm.model.config.rope_parameters["rope_theta"] == 5000.0


@pytest.mark.parametrize("shape", [HeadShape(), HeadShape(scale=0.5), HeadShape(scale=2.0, softcap=3.0)])
@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_the_chunked_loss_is_the_loss(monkeypatch, shape, rows):
    monkeypatch.setattr("rlinf_plugins_text.model.cross_entropy.LOGITS_AT_ONCE", rows * 40)
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(s, generator=generator).requires_grad_() for s in ((23, 8), (40, 8), (40,)))
    targets = torch.randint(40, (23,), generator=generator)
    logits = torch.nn.functional.linear(hidden, weight, bias) * shape.scale
    logits = shape.softcap * torch.tanh(logits / shape.softcap) if shape.softcap else logits
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    wanted = torch.autograd.grad(expected * 0.7, (hidden, weight, bias))
    loss, hits = linear_cross_entropy(hidden, weight, targets, shape, bias)
    found = torch.autograd.grad(loss * 0.7, (hidden, weight, bias))
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert int(hits) == int((logits.argmax(-1) == targets).sum())
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("settings", [{}, {"packing": True, "shown_samples": 1, "shown_tokens": 3}])
def test_the_policy_conforms(settings):
    check_policy(tiny_policy(max_length=64, **settings), sample(TEXTS[0], TEXTS[1]))


def test_a_tied_head_is_one_parameter():
    module = with_values(tiny_policy())
    names = [name for name, _ in module.named_parameters()]
    assert "lm.model.model.embed_tokens.weight" in names
    assert not any("lm_head" in name for name in names)
    assert module.lm.model.lm_head.weight is module.lm.model.model.embed_tokens.weight


def test_initial_values_are_spread_as_the_architecture_says():
    policy = tiny_policy(config=QWEN3 | {"initializer_range": 0.5})
    with torch.device("meta"):
        module = policy.build()
    weight = module.initial_value("lm.model.model.layers.0.mlp.up_proj.weight", (400, 100), torch.Generator())
    assert float(weight.std()) == pytest.approx(0.5, rel=0.02)
    norm = module.initial_value("lm.model.model.norm.weight", (32,), torch.Generator())
    assert torch.equal(norm, torch.ones(32))


def test_answers_are_those_of_generate():
    policy = tiny_policy(max_length=64, shown_samples=2, shown_tokens=6)
    module = with_values(policy).eval()
    model = reference(policy, module).eval()
    batch = policy.collate([sample(text, untrained=5) for text in TEXTS[:2]])
    tokenizer = policy.text_tokenizer()
    lines = module.answers(batch)
    assert lines == module.answers(batch)  # Ranks must stay in step.
    for text, line in zip(TEXTS, lines, strict=False):
        prompt = torch.tensor([text[:5]])
        said = model.generate(prompt, max_new_tokens=6, do_sample=False, attention_mask=torch.ones_like(prompt))
        assert f"⟦{tokenizer.decode(said[0, 5:].tolist())}⟧".replace("\n", "↵") in line


def test_configs_load_without_torch():
    """In a fresh interpreter; `model_config` is found in the package `weights` all the same."""
    code = (
        "import sys, rlinf_plugins_text.plugin, rlinf_plugins_text.weights as weights\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
        "assert callable(weights.model_config)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_layers_with_adapters_start_from_the_same_values():
    policy = tiny_policy()
    with torch.device("meta"):
        plain, adapted = policy.build(), policy.build()
        options = low_rank.LowRankOptions(rank=2)
        low_rank.rlinf_policy_built(adapted, SimpleNamespace(plugin_options=lambda _: options))
    shapes = {name: tuple(parameter.shape) for name, parameter in plain.named_parameters()}
    added = dict(adapted.named_parameters()).keys() - shapes.keys()
    assert {name.rpartition(".")[2] for name in added} == {"up", "down"}
    for name in (name for name in shapes if name.rpartition(".")[0] in {one.rpartition(".")[0] for one in added}):
        values = [initial_value(policy, module, 0, name, shapes[name]) for module in (plain, adapted)]
        assert torch.equal(*values), name
        assert values[0].any()
