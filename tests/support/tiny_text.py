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
    from rlinf_core.training.state.fsdp import derived_seed, materialize

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


def tokenizer_folder(folder, special, *, eos, bos="", template="", added=()):
    """A tokenizer with a token per byte and some special ones, written as transformers does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    folder.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={one: number for number, one in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    tokenizer.add_tokens(list(added))
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos} | ({"bos_token": bos} if bos else {})
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if template:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def trained_parts(row, policy):
    """What is trained of a row, piece by piece."""
    import numpy as np

    tokenizer = policy.text_tokenizer()
    edges = np.flatnonzero(np.diff(row["trained"], prepend=False, append=False)).tolist()
    pieces = zip(edges[::2], edges[1::2], strict=True)
    return [tokenizer.decode(row["tokens"][begin:end].tolist()) for begin, end in pieces]
