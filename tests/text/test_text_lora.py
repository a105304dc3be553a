"""Language models with adapters: a run that resumes, PEFT's own library on both sides, and what is refused."""

import json

import pytest
import torch
from damaging import complaint, damaged, damaged_bytes, examples
from distributions import ROOT
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_text import PLANS, sample, some_tokens, tiny_policy
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlinf_core import UserError
from rlinf_core.config.load import load_config
from rlinf_core.export import Choice, export_run
from rlinf_core.loggers.jsonl import read_rows
from rlinf_core.lora.layers import LoraLinear
from rlinf_core.plugins.registry import get_plugins
from rlinf_core.preflight import check_run
from rlinf_core.training.distributed.processes import processes
from rlinf_core.training.run_folder import prepare_folder
from rlinf_core.training.state.adapters import Original, find_adapters
from rlinf_core.training.state.build import opened_weights
from rlinf_core.training.state.fsdp import materialize
from rlinf_plugins_text.weights import model_config

TOKENS = torch.tensor([some_tokens(24)])
ROUNDING = 2e-5


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny model as transformers saves it."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(model_config(tiny_policy().model_table()))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5 if parameter.ndim > 1 else 1)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(PLANS).save_pretrained(folder)
    return folder


def settings(base, folder):
    return [
        *(f"policy.weights={base}", f"policy.tokenizer={PLANS}", "policy.shown_samples=0"),
        *(f"runner.output_dir={folder}", "runner.val_check_interval=0", "data.validation_fraction=0"),
        *("trainer.global_batch_size=4", "trainer.micro_batch_size=2", "optim.warmup_steps=0", "optim.lr=1e-2"),
        *("policy.lora.rank=4", "policy.lora.alpha=6", "policy.lora.dropout=0.1", "optim.ema_decay=0.5"),
        "policy.lora.rank_pattern={ q_proj = 3 }",
    ]


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    """A run of four steps, and one that was stopped after two: the folder of the second, and the losses of both."""
    folder, losses = tmp_path_factory.mktemp("runs"), {}
    example = (ROOT / "examples" / "text_sft.toml").read_text().splitlines()
    (folder / "run.toml").write_text("\n".join(line for line in example if not line.startswith("config = ")))
    for name, stops in {"whole": [4], "resumed": [2, 4]}.items():
        for stop in stops:
            with pytest.MonkeyPatch.context() as patch, processes("cpu") as group:
                patch.delenv("RANK", raising=False)
                given = [*settings(base, folder), f"runner.name={name}", f"runner.max_steps={stop}"]
                config = load_config(folder / "run.toml", given)
                start = prepare_folder(config, overwrite=False)
                trainer = config.trainer.build(config, start=start, group=group, plugins=get_plugins())
                trainer.train()
        losses[name] = [row["loss"] for row in read_rows(config.folder / "metrics.jsonl") if "loss" in row]
    return config.folder, losses, trainer


def test_a_resumed_run_is_the_same_to_the_bit(run):
    _, losses, trainer = run
    assert len(losses["whole"]) == 4
    assert losses["resumed"] == losses["whole"]
    frozen = [p for p in trainer.policy.parameters() if not p.requires_grad]
    assert frozen
    assert {p.dtype for p in frozen} == {torch.bfloat16}
    assert all("lora_" in name for name in trainer.ema.state_dict())
    held = [name for name in trainer.optimizer.state_dict() if "lm.model" in name]
    assert held
    assert all("lora_" in name for name in held)


@torch.no_grad()
def logits(model):
    return model.eval()(TOKENS).logits


def test_peft_loads_the_adapters_and_computes_as_the_merged_model(run, base, tmp_path):
    folder, *_ = run
    said = []
    export_run(folder, tmp_path / "merged", Choice(adapters="merge", ema=False), get_plugins(), said.append)
    export_run(folder, tmp_path / "alone", Choice(adapters="alone", ema=False), get_plugins(), said.append)
    assert any("adapters of 14 matrices" in line for line in said)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():  # The run held the base in bfloat16.
        for parameter in theirs.parameters():
            parameter.copy_(parameter.bfloat16())
    before = logits(theirs)
    peft = PeftModel.from_pretrained(theirs, tmp_path / "alone")
    layer = peft.base_model.model.model.layers[0]
    assert layer.self_attn.q_proj.scaling["default"] == 6 / 3
    assert layer.mlp.up_proj.scaling["default"] == 6 / 4
    ours = logits(merged)
    assert float((ours - before).abs().max()) > 0.01
    assert torch.allclose(logits(peft), ours, atol=ROUNDING * float(ours.abs().max()))
    assert json.loads((tmp_path / "alone" / "rlinf.json").read_text())["adapters"]["base"] == str(base)


def build(base, **lora):
    """The policy with adapters, as a run builds it, in float32."""
    policy = tiny_policy(
        weights=str(base), config={}, tokenizer="", chat_template="", lora=lora | {"base_dtype": "fp32"}
    )
    with torch.device("meta"):
        module = policy.build()
        before = Original.of(module)
        policy.add_lora(module)
    adapters, weights = find_adapters(before, module, lambda: "lora"), opened_weights(policy)

    def value(name, shape):
        return adapters.initial_value(0, name, shape) if name in adapters.owners else weights.tensor(name)

    materialize(module, torch.device("cpu"), value)
    return policy, module


def test_adapters_of_peft_are_continued(base, tmp_path):
    """Other ranks for some layers, rsLoRA, and a module that PEFT has trained whole."""
    theirs = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(
        r=4,
        lora_alpha=3,
        use_rslora=True,
        target_modules=["q_proj", "v_proj", "down_proj"],
        rank_pattern={"down_proj": 2},
        alpha_pattern={"v_proj": 5},
        modules_to_save=["model.norm"],
    )
    model = get_peft_model(theirs, config)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "peft")
    policy, module = build(base, weights=str(tmp_path / "peft"))
    batch = policy.collate([sample(TOKENS[0].tolist(), untrained=1)])
    loss, weight, *_ = module(batch)
    wanted = model.eval()(TOKENS, labels=TOKENS).loss
    assert float(loss / weight) == pytest.approx(float(wanted), rel=1e-5)
    assert "rank 2, 4" in policy.describe_lora()
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    assert {name for name in trained if "lora_" not in name} == {"lm.model.model.norm.weight"}


def test_validate_counts_what_a_run_trains(run, base, tmp_path):
    folder, _, trainer = run
    config = load_config(folder / "config.toml", [])
    said = check_run(config, get_plugins()).facts["adapters"]
    trained = sum(p.numel() for p in trainer.policy.parameters() if p.requires_grad)
    assert said.startswith(f"{trained:,} of ")
    assert "in adapters of 14 matrices (rank 3, 4)" in said


def test_new_adapters_change_nothing_and_no_rank_is_frozen(base):
    batch_of = [sample(TOKENS[0].tolist(), untrained=1)]
    losses = []
    for lora in ({"rank": 4}, {"rank": 0, "modules_to_save": ("norm",)}, {"targets": ("self_attn.q_proj",)}):
        policy, module = build(base, **lora)
        losses.append(module(policy.collate(batch_of)).loss_sum)
    assert losses[0] == losses[1] == losses[2]
    assert sum(isinstance(one, LoraLinear) for one in module.modules()) == 2


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        ({"targets": ("q_prj",)}, r"'q_prj' matches no layer of the policy; did you mean 'q_proj' .*groups are"),
        ({"modules_to_save": ("head",)}, r"modules_to_save: 'head' matches no layer"),
        ({"targets": ("[",)}, r"'\[' is not a regular expression"),
        ({"rank_pattern": {"x_proj": 2}}, r"rank_pattern: 'x_proj' matches no layer"),
    ],
)
def test_expressions_that_match_nothing_are_named(base, lora, said):
    policy = tiny_policy(weights=str(base), config={}, tokenizer="", chat_template="", lora=lora)
    with pytest.raises(UserError, match=said):
        policy.describe_lora()
    with torch.device("meta"), pytest.raises(UserError, match=said):
        policy.add_lora(policy.build())


@pytest.fixture(scope="module")
def saved(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("peft")
    theirs = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    get_peft_model(theirs, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"peft_type": "IA3"}, "peft_type = 'IA3'"),
        ({"use_dora": True}, r"use_dora \(DoRA's magnitudes\)"),
        ({"bias": "lora_only"}, "bias = 'lora_only'"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base weights"),
        ({"lora_alpha": "x"}, "lora_alpha of .* is 'x'"),
    ],
)
def test_what_peft_has_and_this_has_not_is_named(base, saved, tmp_path, change, said):
    table = json.loads((saved / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(table | change))
    save_file(load_file(saved / "adapter_model.safetensors"), tmp_path / "adapter_model.safetensors")
    policy = tiny_policy(weights=str(base), config={}, tokenizer="", lora={"weights": str(tmp_path)})
    with pytest.raises(UserError, match=said):
        policy.describe_lora()


def test_adapters_that_do_not_fit_are_listed(base, saved, tmp_path):
    tensors = load_file(saved / "adapter_model.safetensors")
    names = sorted(tensors)
    tensors[names[0]] = torch.zeros(2, 5)
    del tensors[names[3]]
    tensors["base_model.model.model.layers.9.mlp.x_proj.lora_A.weight"] = torch.zeros(2, 2)
    (tmp_path / "adapter_config.json").write_bytes((saved / "adapter_config.json").read_bytes())
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    policy = tiny_policy(weights=str(base), config={}, tokenizer="", lora={"weights": str(tmp_path)})
    with pytest.raises(UserError) as error:
        policy.describe_lora()
    for part in ("layers.9.mlp.x_proj.lora_A.weight unexpected", "without its other half", r"A [2, 5] and B"):
        assert part in str(error.value)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match="not a readable safetensors file"):
        policy.describe_lora()


def test_adapters_need_the_weights_that_they_belong_to(saved):
    with pytest.raises(UserError, match=r"belong to pretrained weights: name them in policy\.weights"):
        tiny_policy(lora={"weights": str(saved)}).describe_lora()


def test_damaged_adapters_are_one_message_each(base, saved, tmp_path):
    table = json.loads((saved / "adapter_config.json").read_text()) | {"alpha_pattern": {"q_proj": 3}}
    whole = (saved / "adapter_model.safetensors").read_bytes()
    policy = tiny_policy(weights=str(base), config={}, tokenizer="", lora={"weights": str(tmp_path)})

    @examples(30)
    @given(st.data())
    def run(data):
        (tmp_path / "adapter_config.json").write_text(json.dumps(data.draw(damaged(table))))
        (tmp_path / "adapter_model.safetensors").write_bytes(data.draw(damaged_bytes(whole)))
        complaint(policy.describe_lora, tmp_path)

    run()


def test_an_expression_in_a_file_cannot_take_forever(base, saved, tmp_path):
    table = json.loads((saved / "adapter_config.json").read_text())
    (tmp_path / "adapter_model.safetensors").write_bytes((saved / "adapter_model.safetensors").read_bytes())
    policy = tiny_policy(weights=str(base), config={}, tokenizer="", lora={"weights": str(tmp_path)})
    for pattern in ("((.*)*)*x", ".*" * 30 + "x"):
        (tmp_path / "adapter_config.json").write_text(json.dumps(table | {"alpha_pattern": {pattern: 2}}))
        with pytest.raises(UserError, match="too complex a regular expression"):
            policy.describe_lora()
