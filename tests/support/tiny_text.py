"""Language models with a few thousand parameters, and chats to fine-tune them on."""

import json

import torch
from distributions import ROOT

from rlinf_plugins_text import TextDatasetConfig, TextPolicyConfig

PLANS = ROOT / "examples" / "data" / "text_plans"
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
QWEN3 = {"model_type": "qwen3", **SIZES, "tie_word_embeddings": True}


def tiny_policy(**settings):
    table = {"weights": "random", "tokenizer": str(PLANS), "chat_template": "chatml", "config": QWEN3}
    return TextPolicyConfig(**(table | {"shown_samples": 0} | settings))


def with_values(policy, seed=0):
    """The built module on the CPU with initial values larger than usual, so that words matter."""
    from rlinf_core.training.fsdp import derived_seed, materialize

    with torch.device("meta"):
        module = policy.build()

    def value(name, shape):
        generator = torch.Generator().manual_seed(derived_seed(seed, policy.published_name(name)))
        initial = module.initial_value(name, shape, generator)
        return initial * 5 if len(shape) > 1 else initial + 0.1 * torch.randn(shape, generator=generator)

    materialize(module, torch.device("cpu"), value)
    return module


def sample(*texts, untrained=2):
    """A sample of texts, each a list of tokens of which the first few are not trained."""
    import numpy as np

    trained = [np.arange(len(text)) >= untrained for text in texts]
    lengths = [len(text) for text in texts]
    return {
        "tokens": np.concatenate([np.array(text, np.int32) for text in texts]),
        "trained": np.concatenate(trained),
        "document_lengths": np.array(lengths, np.int32),
        "full_lengths": np.array(lengths, np.int64),
        "left_out": "",
    }


def some_tokens(length, seed=0, words=300):
    return torch.randint(3, words, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def dataset(path, **settings):
    return TextDatasetConfig(config_name="text", repo_id=str(path), **settings)
