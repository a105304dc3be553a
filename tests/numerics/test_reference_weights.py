"""The reference's own parameters and the published ones are the same numbers under other names."""

import torch
from pi0_case import read_dimensions

from rlinf_plugins_openpi.model.pi0 import Pi0
from rlinf_plugins_openpi.weights.layouts import JAX
from rlinf_plugins_openpi.weights.source import PublishedWeights


def test_the_references_parameters_are_the_published_ones(model_case, report):
    dimensions = read_dimensions(model_case)
    shapes = {name: tuple(parameter.shape) for name, parameter in Pi0(dimensions).named_parameters()}
    theirs = PublishedWeights(model_case / "params_jax.safetensors", dimensions)
    assert theirs.layout.layout is JAX
    theirs.check(shapes)
    published = PublishedWeights(model_case / "params_torch.safetensors", dimensions)
    off = [name for name in shapes if not torch.equal(theirs.tensor(name), published.tensor(name))]
    report(f"model/{model_case.name}", "JAX parameters that differ from the published", len(off), 0)
