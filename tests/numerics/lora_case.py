"""A recorded model with openpi's LoRA: the model of another case, and its adapters as ours."""

import json

import torch
from golden import GOLDEN
from pi0_case import read_model
from safetensors.torch import load_file

from rlinf_plugins_openpi.lora import layout
from rlinf_plugins_openpi.lora.apply import add_openpi_lora
from rlinf_plugins_openpi.lora.config import OpenpiLoraConfig
from rlinf_plugins_openpi.weights.names import published_names

EXPERTS = {"vlm": "paligemma", "expert": "action_expert"}
"""Ours -> as the case's config has it."""


def read_config(case):
    return json.loads((case / "config.json").read_text())


def read_lora(case, experts=tuple(EXPERTS)):
    """The settings of a case; other experts get no adapters."""
    recorded = read_config(case)["lora"]
    sizes = {one: recorded[theirs] for one, theirs in EXPERTS.items()}
    return OpenpiLoraConfig(
        convention="openpi",
        targets=experts,
        rank_pattern={one: size["rank"] for one, size in sizes.items()},
        # The sets may set rslora for one expert only; the factor is what counts.
        alpha_pattern={one: size["attn_scaling"] * size["rank"] for one, size in sizes.items()},
        base_dtype="fp32",
    )


def matrix_names(dimensions):
    names = published_names(dimensions)
    return {own.removesuffix(".weight"): name.removesuffix(".weight") for own, name in names.items()}


def base_of(case):
    """The case of the model without adapters, and its weights."""
    weights = GOLDEN / read_config(case)["base"]
    return weights.parent, weights


def read_base(case):
    folder, weights = base_of(case)
    return read_model(folder, weights)


def read_adapted(case, lora=None):
    """The model with the recorded adapters, by default those of the case, trained by the reference's filter."""
    model, lora = read_base(case), lora or read_lora(case)
    add_openpi_lora(model, lora, matrix_names(model.dimensions))
    stored = load_file(case / "lora_jax.safetensors")
    with torch.no_grad():
        for name, _, value in from_arrays(model, lora, stored):
            model.get_parameter(name).copy_(value)
    return model


def from_arrays(model, lora, arrays):
    """(our parameter, the reference's name, this layer of the array) for all adapters."""
    for pair in layout.pairs(model.dimensions, lora.ranks, lora.scales):
        for kind in ("a", "b"):
            key = f"{pair.array}lora_{kind}"
            yield f"{pair.layer}.lora_{kind}_{pair.name}", key, arrays[key][pair.depth]


def as_arrays(model, lora, tensors):
    """Our parameters' tensors as the reference has them, layers stacked."""
    out = {}
    for pair in layout.pairs(model.dimensions, lora.ranks, lora.scales):
        for kind in ("a", "b"):
            name = f"{pair.layer}.lora_{kind}_{pair.name}"
            value = tensors.get(name)
            shape = model.get_parameter(name).shape
            layers = out.setdefault(f"{pair.array}lora_{kind}", {})
            layers[pair.depth] = torch.zeros(shape) if value is None else value
    return {key: torch.stack([layers[depth] for depth in sorted(layers)]) for key, layers in out.items()}
