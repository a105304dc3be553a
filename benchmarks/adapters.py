"""A step with adapters (LoRA) beside PEFT's on the same module and beside a full-parameter step, and what π0.5 needs.

    python benchmarks/adapters.py [--rounds 5] [--steps 4] [--json]

A language model of transformers (Qwen3's architecture, float32, on the CPU, one thread) is trained three times on the
same tokens with the same AdamW: whole, with this project's adapters, and with PEFT's, of equal rank in the same layers
and with equal values. The sides take turns; medians of processor time are compared. Nothing is reported unless the
losses of the two kinds of adapters agree. The bytes of a rank are what `rlinf plan` predicts for π0.5 (full size, two
cameras, a micro batch of one, one GPU, adapters of rank 16 and 32). PEFT is in the dependency group `peers`.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from reporting.result_line import ResultLine

SIZES = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "head_dim": 64, "vocab_size": 512}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK, TEXTS, LENGTH = 16, 4, 128
TOLERANCE = 1e-5
PI05 = """
[data]
config_name = "pi05_libero"
repo_id = "physical-intelligence/libero"
[policy]
weights = "random"
tokenizer = "google/paligemma-3b-pt-224"
{}
[trainer]
type = "fsdp2"
global_batch_size = 1
micro_batch_size = 1
"""
LORA = "[policy.lora]\nrank_pattern = { vlm = 16, expert = 32 }"


def main() -> int:
    """Measure, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object, on the last line")
    parser.add_argument("--steps", type=int, default=4, help="timed steps per side and round")
    parser.add_argument("--rounds", type=int, default=5, help="rounds; every side trains once in each")
    options = parser.parse_args()
    line = ResultLine("adapters", wanted=options.json)
    import torch

    torch.set_num_threads(1)
    sides = build_sides()
    losses = {name: one_step(*side) for name, side in sides.items()}  # Also warms up.
    if abs(losses["adapters"] / losses["peft"] - 1) > TOLERANCE:
        print(f"error: the sides' first losses differ: {losses}", file=sys.stderr)
        return 1
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(options.rounds):
        for name in sorted(sides, reverse=bool(number % 2)):
            start = time.process_time()
            for _ in range(options.steps):
                one_step(*sides[name])
            seconds[name].append((time.process_time() - start) / options.steps)
    medians = {name: statistics.median(some) for name, some in seconds.items()}
    planned = {name: planned_gb(table) for name, table in {"lora": LORA, "full": ""}.items()}
    held = {name: state_bytes(model) for name, (model, _, _) in sides.items()}
    results = {
        "step_vs_peft": medians["peft"] / medians["adapters"],
        "step_vs_full": medians["full"] / medians["adapters"],
        "state_bytes_vs_full": held["full"] / held["adapters"],
        "plan_gb_pi05_24": planned["lora"],
        "plan_gb_pi05_full": planned["full"],
    }
    text = "\n".join(f"{name:20} {value:.2f}" for name, value in results.items())
    details = {
        "seconds_per_step": medians,
        "settings": {"rank": RANK, "texts": TEXTS, "length": LENGTH, "rounds": options.rounds, "steps": options.steps},
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
    }
    line.write(results, text, **details)
    return 0


def build_sides() -> dict[str, tuple[Any, Any, Any]]:
    """Side -> model, optimizer and tokens. Adapters have equal values; B is not zero, as after some steps."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    from rlinf_core.lora.layers import LoraLinear, Slice

    torch.manual_seed(0)
    config = AutoConfig.for_model("qwen3", **SIZES, **HEADS)
    whole = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    tokens = torch.randint(0, SIZES["vocab_size"], (TEXTS, LENGTH))
    theirs = get_peft_model(copy.deepcopy(whole), LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(LAYERS)))
    ours = copy.deepcopy(whole).requires_grad_(False)
    for name, layer in list(ours.named_modules()):
        if name.rpartition(".")[2] not in LAYERS:
            continue
        ours.set_submodule(name, LoraLinear(layer, [Slice(name, 0, layer.out_features, RANK, 1.0)]))
        its = theirs.get_submodule(f"base_model.model.{name}")
        with torch.no_grad():
            for kind, parameter in (("A", its.lora_A["default"].weight), ("B", its.lora_B["default"].weight)):
                parameter.normal_(0.0, 0.02)
                getattr(ours.get_submodule(name), f"lora_{kind}_{name.rpartition('.')[2]}").copy_(parameter)
    models = {"full": whole, "adapters": ours, "peft": theirs}
    return {
        name: (model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4), tokens)
        for name, model in models.items()
    }


def one_step(model: Any, optimizer: Any, tokens: Any) -> float:
    """Train one step; returns the loss."""
    loss = model(tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def state_bytes(model: Any) -> int:
    """Weights, gradients and AdamW's moments, in float32."""
    return sum(p.numel() * (16 if p.requires_grad else 4) for p in model.parameters())


def planned_gb(lora: str) -> float:
    """The memory of a GPU that trains π0.5, in GB."""
    from rlinf_core.config.load import load_config
    from rlinf_core.plan.step import plan
    from rlinf_core.plugins.registry import get_plugins

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.toml"
        path.write_text(PI05.format(lora), encoding="utf-8")
        return plan(load_config(path), get_plugins(), 1).memory().total / 1e9


if __name__ == "__main__":
    sys.exit(main())
