"""`rlinf validate` compares weights of transformers with their config.json, by headers alone."""

import json
import re

import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny_text import PLANS, tiny_policy

from rlinf_core import UserError

SIZES = {"vocab_size": 400, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2}
TABLE = {"model_type": "qwen3", **SIZES, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4}


def tensors():
    shapes = {"embed_tokens": (400, 8), "norm": (8,)}
    for i in range(2):
        attention, mlp = f"layers.{i}.self_attn.", f"layers.{i}.mlp."
        shapes |= {f"{attention}q_proj": (8, 8), f"{attention}k_proj": (4, 8), f"{attention}v_proj": (4, 8)}
        shapes |= {f"{attention}o_proj": (8, 8), f"{mlp}gate_proj": (12, 8), f"{mlp}up_proj": (12, 8)}
        shapes |= {f"{mlp}down_proj": (8, 12), f"layers.{i}.input_layernorm": (8,)}
    return {f"model.{name}.weight": np.zeros(shape, np.float32) for name, shape in shapes.items()}


def check(folder, table=None, **changes):
    """Write a folder with changed tensors (None: left out) and check it; returns the policy."""
    folder.mkdir(exist_ok=True)
    found = tensors() | {name.replace("/", "."): value for name, value in changes.items()}
    save_file({name: value for name, value in found.items() if value is not None}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(TABLE | (table or {})))
    policy = tiny_policy(weights=str(folder), tokenizer=str(PLANS), config={})
    policy.check_files()
    return policy


def complaint(folder, *arguments, **changes):
    with pytest.raises(UserError) as error:
        check(folder, *arguments, **changes)
    assert len(str(error.value).splitlines()) <= 12
    return " ".join(str(error.value).split())


Q, EMBED = "model/layers/1/self_attn/q_proj/weight", "model/embed_tokens/weight"
HEAD = "lm_head/weight"


@pytest.mark.parametrize(
    ("table", "change", "said"),
    [
        ({}, {Q: None}, "layer 1 lacks self_attn.q_proj.weight. Is a file missing or damaged?"),
        ({}, {Q: np.zeros((8, 6), np.float32)}, "model.layers.1.self_attn.q_proj.weight is [8, 6], not [8, 8]"),
        ({"intermediate_size": 16}, {}, "mlp.down_proj.weight is [8, 12], not [8, 16]"),
        ({"num_hidden_layers": 3}, {}, "config.json has 3 layers, the files have 2, without 2"),
        ({"num_hidden_layers": 1}, {}, "config.json has 1 layers, the files have 2: 0 to 1"),
        ({}, {EMBED: np.zeros((403, 8), np.float32)}, "set policy.config = { vocab_size = 403 }"),
        ({}, {Q: np.zeros((8, 8), np.int8)}, "the weights are I8: use the model in float32"),
        ({}, {"model/layers/1/self_attn/q_proj/qweight": np.zeros(2, np.int32)}, "are quantised (model.layers.1"),
        ({"quantization_config": {"quant_method": "gptq"}}, {}, "the model is quantised (gptq)"),
        ({}, {"visual/blocks/0/weight": np.zeros(2, np.float32)}, "those of a multimodal model (visual.blocks.0"),
        ({}, {"model/layers/0/q/lora_A/weight": np.zeros(2, np.float32)}, "hold adapters (model.layers.0.q.lora_A"),
        (
            {"tie_word_embeddings": True},
            {HEAD: np.ones((400, 8), np.float32)},
            "differs from model.embed_tokens.weight: it was trained by itself. Set policy.config = "
            "{ tie_word_embeddings = false }",
        ),
        ({"tie_word_embeddings": False}, {}, "set policy.config = { tie_word_embeddings = true }"),
    ],
)
def test_headers_that_contradict_the_config_are_refused(tmp_path, table, change, said):
    assert said in complaint(tmp_path, table, **change)


def test_folders_that_fit_are_let_pass(tmp_path):
    check(tmp_path)
    check(tmp_path, {"tie_word_embeddings": True}, **{HEAD: np.zeros((400, 8), np.float32)})  # Stored twice, equal.
    check(tmp_path, {"tie_word_embeddings": False}, **{HEAD: np.ones((400, 8), np.float32)})
    check(tmp_path, {"model_type": "mamba2"}, **{Q: None})  # Layers of other kinds.
    policy = check(tmp_path)
    changed = policy.model_copy(update={"config": {"num_hidden_layers": 5}})
    with pytest.raises(UserError, match=r"config\.json has 5 layers"):
        changed.check_files()


def test_what_is_there_instead_of_weights_is_named(tmp_path):
    for file, said in (
        ("adapter_config.json", r"adapters of PEFT .* in policy\.lora\.weights"),
        ("pytorch_model.bin", r"It holds pickles .*\.from_pretrained\(FOLDER\)\.save_pretrained\(OTHER_FOLDER\)"),
        ("checkpoint-500/model.safetensors", r'set policy\.weights = ".*checkpoint-500"'),
        ("model-q4.gguf", "quantised weights"),
    ):
        folder = tmp_path / re.sub(r"\W", "_", file)
        (folder / file).parent.mkdir(parents=True)
        (folder / file).write_text("{}")
        (folder / "config.json").write_text(json.dumps(TABLE))
        with pytest.raises(UserError, match=said):
            tiny_policy(weights=str(folder), tokenizer=str(PLANS), config={}).check_files()


def test_an_index_whose_files_lack_tensors_is_refused(tmp_path):
    check(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "one.safetensors")
    places = dict.fromkeys((*tensors(), "model.gone.weight"), "one.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises(UserError, match=r"lists tensors that its files lack: model\.gone\.weight"):
        tiny_policy(weights=str(tmp_path), tokenizer=str(PLANS), config={}).check_files()
