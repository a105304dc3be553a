"""The config.json and tokenizer_config.json of an export are read by transformers 4 and 5."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from tiny_text import PLANS, QWEN3, SIZES, tiny_policy
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from rlinf_core import UserError
from rlinf_plugins_text.weights import model_config

TRANSFORMERS_4 = ("transformers==4.57.6", "huggingface_hub==0.36.0")
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
GEMMA3 = {
    "model_type": "gemma3_text",
    **SIZES,
    "layer_types": ["sliding_attention", "full_attention"],
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
}
BASES = {
    "of transformers 4": QWEN3 | {"rope_theta": 1e6, "rope_scaling": None, "torch_dtype": "bfloat16"},
    "of transformers 5": QWEN3 | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "dtype": "bfloat16"},
    "scaled": QWEN3 | {"rope_theta": 1e6, "rope_scaling": YARN},
    "two bases": GEMMA3,
    "a part of each head": {"model_type": "phi", **SIZES, "rope_theta": 5e3, "partial_rotary_factor": 0.5},
    "untied": QWEN3 | {"tie_word_embeddings": False, "rope_theta": 1e6},
}
OLDER = {
    "of transformers 4": {"rope_theta": 1e6, "rope_scaling": None},
    "of transformers 5": {"rope_theta": 1e6, "rope_scaling": None},
    "scaled": {"rope_theta": 1e6, "rope_scaling": YARN},
    "two bases": {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": GEMMA3["rope_scaling"]},
    "a part of each head": {"rope_theta": 5e3, "partial_rotary_factor": 0.5},
    "untied": {"rope_theta": 1e6, "tie_word_embeddings": False},
}


def export(base, folder):
    policy = tiny_policy(config=base | {"vocab_size": 512})
    model = AutoModelForCausalLM.from_config(model_config(policy.model_table()), dtype=torch.float32)
    tied = set(model.all_tied_weights_keys) if model.config.tie_word_embeddings else set()
    folder.mkdir()
    weights = {f"lm.model.{name}": t for name, t in model.state_dict().items() if name not in tied}
    policy.save_weights(weights, folder)
    return json.loads((folder / "config.json").read_text())


def within(wanted, found):
    """Whether a table holds what is wanted, at every level."""
    if isinstance(wanted, dict):
        return isinstance(found, dict) and all(within(value, found.get(key)) for key, value in wanted.items())
    return wanted == found


@pytest.mark.parametrize("base", BASES)
def test_older_keys_stand_beside_the_new_ones(base, tmp_path):
    written = export(BASES[base], tmp_path / "model")
    assert within(OLDER[base], written), written
    assert written["dtype"] == written["torch_dtype"] == "float32"
    read = AutoConfig.from_pretrained(tmp_path / "model")
    expected = model_config({**BASES[base], "vocab_size": 512})
    if base != "two bases":
        assert within(expected.rope_parameters, read.rope_parameters)
    else:
        for kind, rope in expected.rope_parameters.items():
            assert within(rope, read.rope_parameters[kind])
    assert read.tie_word_embeddings == expected.tie_word_embeddings
    AutoModelForCausalLM.from_pretrained(tmp_path / "model")


def test_policy_config_changes_the_older_keys_too(tmp_path):
    changed = BASES["of transformers 4"] | {"rope_parameters": {"rope_type": "default", "rope_theta": 5e6}}
    assert export(changed, tmp_path / "model")["rope_theta"] == 5e6


def test_the_template_used_in_training_is_in_both_files(tmp_path):
    tokenizer = tmp_path / "tokenizer"
    shutil.copytree(PLANS, tokenizer)
    path = tokenizer / "tokenizer_config.json"
    table = json.loads(path.read_text()) if path.exists() else {}
    named = {"name": "rag", "template": "rag"}
    table |= {"chat_template": [{"name": "default", "template": "old"}, named]}
    table |= {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<|im_start|>"]}
    path.write_text(json.dumps(table))
    (tokenizer / "chat_template.jinja").unlink(missing_ok=True)
    policy = tiny_policy(tokenizer=str(tokenizer))
    folder = tmp_path / "model"
    folder.mkdir()
    policy.save_weights({"lm.model.model.norm.weight": torch.ones(32)}, folder)
    written = json.loads((folder / "tokenizer_config.json").read_text())
    template = (folder / "chat_template.jinja").read_text()
    assert written["chat_template"] == [{"name": "default", "template": template}, named]
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert written["additional_special_tokens"] == ["<|im_start|>"]
    assert "extra_special_tokens" not in written
    chat = [{"role": "user", "content": "go"}]
    asked = AutoTokenizer.from_pretrained(folder).apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert asked == policy.text_tokenizer().chat.render(chat, ask=True)


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_that_does_not_fit_the_config_is_found_before_the_run(tied, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    export(QWEN3 | {"tie_word_embeddings": tied}, folder)
    policy = tiny_policy(weights=str(folder), tokenizer="", config={})
    policy.check_files()
    path = folder / "model.safetensors"
    tensors = load_file(path)
    if tied:  # A stored copy of the embedding is no head of its own.
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, path)
        policy.check_files()
        tensors["lm_head.weight"][-1, -1] += 1
    else:
        del tensors["lm_head.weight"]
    save_file(tensors, path)
    change = {"tie_word_embeddings": not tied}
    says = rf"[Ss]et policy\.config = \{{ tie_word_embeddings = {str(not tied).lower()} \}}"
    with pytest.raises(UserError, match=says):
        policy.check_files()
    with torch.device("meta"):
        module = policy.build()
    with pytest.raises(UserError, match=says):
        policy.open_weights().check({name: tuple(p.shape) for name, p in module.named_parameters()})
    tiny_policy(weights=str(folder), tokenizer="", config=change).check_files()


@pytest.mark.slow
def test_transformers_4_reads_exports(tmp_path):
    """In an environment of its own, made by uv; the logits are those of transformers 5."""
    uv = os.environ.get("UV") or shutil.which("uv")
    if uv is None:
        pytest.skip("needs uv")
    older = tmp_path / "older"
    install = [uv, "pip", "install", "--python", sys.executable, "--target", str(older), "--no-deps"]
    subprocess.run([*install, *TRANSFORMERS_4], check=True)
    for number, base in enumerate(BASES.values()):
        export(base, tmp_path / str(number))
    code = (
        "import sys, torch, transformers\n"
        "assert transformers.__version__.startswith(sys.argv[1]), transformers.__version__\n"
        "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T\n"
        "for f in sys.argv[2:]:\n"
        "    t = T.from_pretrained(f)\n"
        "    chat = [{'role': 'user', 'content': 'go'}]\n"
        "    said = t.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)\n"
        "    x = M.from_pretrained(f)(torch.arange(3, 83)[None]).logits.double()\n"
        "    print('result', f'{float(x.square().sum()):.4g}', f'{float(x[0, -1, 7]):.4g}', repr(said))\n"
    )
    folders = [str(tmp_path / str(number)) for number in range(len(BASES))]
    lines = []
    for version, path in (("4", [str(older)]), ("5", [])):
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path), "HF_HUB_OFFLINE": "1"}
        run = [sys.executable, "-c", code, version, *folders]
        done = subprocess.run(run, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        lines.append([line for line in done.stdout.splitlines() if line.startswith("result")])
    assert lines[0] == lines[1]
    assert len(lines[0]) == len(BASES)
