"""rlinf's side: a run as a user starts it, by the command and a TOML file."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor, nn

from text_sft.job import DATA, LENGTH, MODEL, Job

CONFIG = """
[runner]
output_dir = {folder}
name = {name}
max_steps = {steps}
save_interval = 0
val_check_interval = 0

[data]
config_name = "text"
repo_id = {rows}
format = "messages"
validation_fraction = 0.0
num_workers = 0

[policy]
weights = {model}
tokenizer = {tokenizer}
chat_template = "chatml"
max_length = {length}
packing = {packed}

[optim]
lr = 1e-4
min_lr = 1e-5
warmup_steps = 5
decay_steps = 100

[trainer]
device = "cpu"
global_batch_size = {batch}
micro_batch_size = {batch}
param_dtype = "fp32"
"""


def write_model(job: Job) -> None:
    """Write random weights, large enough that losses differ where sides compute something else."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    rest = {key: value for key, value in MODEL.items() if key != "model_type"}
    settings = AutoConfig.for_model(MODEL["model_type"], vocab_size=job.vocabulary, **rest)
    model = AutoModelForCausalLM.from_config(settings, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter *= 4
    model.save_pretrained(job.model)


def train(job: Job, name: str = "rlinf") -> list[float]:
    """Train as `rlinf_core.train` does; returns the losses that it logged."""
    from rlinf_core.train import main

    name = f"{name}-{'packed' if job.packed else 'unpacked'}"
    values = {"folder": job.folder, "name": name, "rows": DATA / "plans.jsonl", "model": job.model, "tokenizer": DATA}
    quoted = {key: json.dumps(str(value)) for key, value in values.items()}
    numbers = {"steps": job.all_steps, "length": LENGTH, "packed": str(job.packed).lower(), "batch": job.batch}
    file = job.folder / f"{name}.toml"
    file.write_text(CONFIG.format(**quoted, **numbers), encoding="utf-8")
    code = main([str(file), "--overwrite"])
    if code:
        raise RuntimeError(f"the run ended with code {code}; what it printed is above")
    rows = [json.loads(line) for line in (job.folder / name / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def recorded(job: Job) -> list[dict[str, Tensor]]:
    """The batches of a run, in the order of its steps."""
    from rlinf_plugins_text.model.policy import TextPolicy

    batches: list[dict[str, Tensor]] = []

    def note(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if isinstance(module, TextPolicy):
            batches.append({key: value.clone() for key, value in inputs[0].items()})

    hook = nn.modules.module.register_module_forward_pre_hook(note)
    train(job, "record")
    hook.remove()
    return batches
