"""The part of `check_policy` that needs torch: batches, and the module with its parameters, loss and actions."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from rlinf_core.contract.module import PreviousActions
from rlinf_core.contract.policy import PolicyConfig
from rlinf_core.data.sample import PACKING, Sample
from rlinf_core.testing.findings import Findings
from rlinf_core.testing.weights import check_weights
from rlinf_core.training.state.build import initial_value
from rlinf_core.training.state.fsdp import allocate

SEED = 0
RTOL = 1e-4
"""Allowed relative error between a batch's loss and the sum over its parts: float32 sums in another order."""


def check_collate(findings: Findings, config: PolicyConfig, samples: Sequence[Sample]) -> bool:
    """Check `collate`. Returns whether it gives a batch of tensors."""
    batch = findings.attempt("collate() stacks samples", lambda: config.collate(samples))
    if batch is None:
        return False
    wrong = {"tensors": [], "on the CPU": [], "sample axis first": [], "images": []}  # type: dict[str, list[str]]
    for name, value in _leaves(batch):
        if not isinstance(value, torch.Tensor):
            wrong["tensors"].append(name)
            continue
        wrong["on the CPU"] += [name] * (value.device.type != "cpu")
        packed = name.partition(".")[0] == PACKING
        wrong["sample axis first"] += [name] * (value.ndim == 0 or (len(value) != len(samples) and not packed))
        wrong["images"] += [name] * (name.partition(".")[0] == "images" and value.dtype != torch.uint8)
    findings.expect(not wrong["tensors"], "a batch holds tensors only", ", ".join(wrong["tensors"]))
    findings.expect(not wrong["on the CPU"], "collate() stays on the CPU", ", ".join(wrong["on the CPU"]))
    rule = f"every tensor of a batch has the sample axis first, except those of {PACKING!r}"
    findings.expect(not wrong["sample axis first"], rule, ", ".join(wrong["sample axis first"]))
    findings.expect(not wrong["images"], "images stay uint8", ", ".join(wrong["images"]))
    return not wrong["tensors"]


def check_module(findings: Findings, config: PolicyConfig, samples: Sequence[Sample]) -> None:
    """Check the module by building and using it as a trainer does."""
    module = findings.attempt("build() works on the meta device", lambda: _build(config))
    if module is None:
        return
    needed = ["shard_units", "initial_value", "rebuild_buffers"] + ["sample_actions"] * bool(config.chunk_length())
    needed += list(getattr(module, "forward_methods", ()))
    missing = [name for name in needed if not callable(getattr(module, name, None))]
    if not findings.expect(not missing, "the module follows Policy", f"no {', '.join(missing)}"):
        return
    _check_tensors(findings, module)
    _check_units(findings, module)
    if _give_values(findings, config, module):
        _check_loss(findings, config, module, samples)
        if config.chunk_length():
            batch = config.collate(samples)
            _check_actions(findings, module, batch)
            _check_continuation(findings, config, module, batch)
        check_weights(findings, config, dict(module.named_parameters()))


def _build(config: PolicyConfig) -> Any:
    with torch.device("meta"):
        return config.build()


def _check_tensors(findings: Findings, module: nn.Module) -> None:
    parameters, buffers = dict(module.named_parameters()), dict(module.named_buffers())
    real = [name for name, tensor in (parameters | buffers).items() if not tensor.is_meta]
    findings.expect(not real, "build() allocates nothing under torch.device('meta')", ", ".join(real))
    saved = sorted(module.state_dict().keys() - dict(module.named_parameters(remove_duplicate=False)).keys())
    findings.expect(not saved, "no buffer is persistent: checkpoints hold parameters only", ", ".join(saved))


def _check_units(findings: Findings, module: Any) -> None:
    units = findings.attempt("shard_units() can be listed", lambda: list(module.shard_units()))
    if units is None:
        return
    names = {id(part): name for name, part in module.named_modules() if name}
    units = [(unit, names.get(id(unit.module), "")) for unit in units]
    rule = "every shard unit is a submodule of the policy, not the policy itself"
    findings.expect(all(name for _, name in units), rule)
    twice = sorted({name for i, (_, name) in enumerate(units) if name in [other for _, other in units[:i]]})
    findings.expect(not twice, "no shard unit is listed twice", ", ".join(twice))
    late = [n for i, (_, n) in enumerate(units) if any(n.startswith(f"{outer}.") for _, outer in units[:i] if outer)]
    findings.expect(not late, "inner shard units come before the outer ones that contain them", ", ".join(late))
    dtypes = sorted({str(unit.dtype) for unit, _ in units} - {"compute", "fp32"})
    findings.expect(not dtypes, "a shard unit's dtype is 'compute' or 'fp32'", ", ".join(dtypes))


def _give_values(findings: Findings, config: PolicyConfig, module: Any) -> bool:
    """Set every parameter to its initial value and rebuild the buffers. Returns whether that succeeded."""
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    published = findings.attempt(
        "published_name() can be called", lambda: [config.published_name(name) for name in shapes]
    )
    if published is None:
        return False
    twice = sorted({name for name in published if published.count(name) > 1})
    findings.expect(not twice, "published_name() gives every parameter a different name", ", ".join(twice))

    def value(name: str) -> torch.Tensor:
        return initial_value(config, module, SEED, name, shapes[name])

    values = findings.attempt("initial_value() can be called", lambda: {name: value(name) for name in shapes})
    if values is None:
        return False
    form = [
        name
        for name, found in values.items()
        if (tuple(found.shape), found.dtype, found.device.type) != (shapes[name], torch.float32, "cpu")
    ]
    good = findings.expect(not form, "initial_value() gives the whole shape, float32, on the CPU", ", ".join(form))
    infinite = [name for name, found in values.items() if not bool(found.isfinite().all())]
    findings.expect(not infinite, "initial values are finite", ", ".join(infinite))
    other = [n for n, found in values.items() if n not in infinite and not torch.equal(found, value(n))]
    findings.expect(not other, "initial_value() is a function of its generator alone (contract 2)", ", ".join(other))
    return good and bool(findings.attempt("initial values can be set", lambda: _fill(findings, module, values)))


def _fill(findings: Findings, module: Any, values: Mapping[str, torch.Tensor]) -> bool:
    allocate(module, torch.device("cpu"))
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(values[name])
        for buffer in module.buffers():
            if buffer.is_floating_point():
                buffer.fill_(torch.nan)
    module.rebuild_buffers()
    left = [name for name, buffer in module.named_buffers() if buffer.is_floating_point() and buffer.isnan().any()]
    return findings.expect(not left, "rebuild_buffers() fills every buffer", ", ".join(left))


def _check_loss(findings: Findings, config: PolicyConfig, module: Any, samples: Sequence[Sample]) -> None:
    module.train()
    out = findings.attempt("forward() gives a loss", lambda: module(config.collate(samples)))
    if out is None or not _check_output(findings, config, out):
        return
    if findings.attempt("the loss has gradients", lambda: _backward(out.loss_sum)):
        gradients = {name: p.grad for name, p in module.named_parameters() if p.requires_grad}
        reached = {name: grad for name, grad in gradients.items() if grad is not None}
        rule = "gradients reach parameters, and are finite"
        bad = [name for name, grad in reached.items() if not bool(grad.isfinite().all())]
        findings.expect(not bad and any(bool(grad.any()) for grad in reached.values()), rule, ", ".join(bad) or "none")
        if unused := sorted(gradients.keys() - reached.keys()):
            findings.skip(f"gradients of parameters that this loss does not reach: {', '.join(unused)}")
    _check_sums(findings, config, module, samples)
    rule = "forward() gives a float32 loss when compute units are in bf16, as trainers gather them (contract 3)"
    loss = findings.attempt(rule, lambda: _loss_in_bf16(module, config.collate(samples)))
    findings.expect(loss is None or _is_scalar(loss), rule, _form(loss))


def _loss_in_bf16(module: Any, batch: Mapping[str, Any]) -> torch.Tensor:
    """The loss with each compute unit's parameters in bf16 while the unit runs; inputs are not cast."""
    lower = copy.deepcopy(module)
    decided: set[int] = set()
    for unit in lower.shard_units():  # Inner units come first: a parameter belongs to its innermost unit.
        own = [parameter for parameter in unit.module.parameters() if id(parameter) not in decided]
        decided |= {id(parameter) for parameter in own}
        if unit.dtype == "compute":
            unit.module.register_forward_pre_hook(partial(_cast, own, torch.bfloat16))
            unit.module.register_forward_hook(partial(_cast, own, torch.float32))
    with torch.no_grad():
        loss: torch.Tensor = lower(batch).loss_sum
    return loss


def _cast(parameters: Sequence[nn.Parameter], dtype: torch.dtype, *_: Any) -> None:
    for parameter in parameters:
        parameter.data = parameter.data.to(dtype)


def _backward(loss: torch.Tensor) -> bool:
    torch.autograd.backward(loss)
    return True


def _check_output(findings: Findings, config: PolicyConfig, out: Any) -> bool:
    """Check the fields of a `PolicyOutput`."""
    fields = ("loss_sum", "weight", "metrics", "sample_losses")
    if not findings.expect(
        all(hasattr(out, f) for f in fields), "forward() returns a PolicyOutput", type(out).__name__
    ):
        return False
    loss, weight = out.loss_sum, out.weight
    good = [
        findings.expect(
            _is_scalar(loss) and loss.requires_grad, "loss_sum is a float32 scalar with a gradient", _form(loss)
        ),
        findings.expect(_is_scalar(weight) and not weight.requires_grad, "weight is a float32 scalar", _form(weight)),
    ]
    loose = [
        k for k, v in out.metrics.items() if not (isinstance(v, torch.Tensor) and v.ndim == 0 and not v.requires_grad)
    ]
    findings.expect(not loose, "metrics are detached scalars", ", ".join(loose))
    _check_validation_metrics(findings, config, out.metrics)
    if all(good):
        findings.expect(bool(loss.isfinite()), "the loss is finite", float(loss.detach()))
        findings.expect(float(weight) > 0, "the weight is positive", float(weight))
    return all(good)


def _check_validation_metrics(findings: Findings, config: PolicyConfig, metrics: Mapping[str, Any]) -> None:
    """Check that validation metrics are functions of the loss and the policy's own metrics."""
    if not isinstance(config.validation_metrics, Mapping):  # Already reported by `check_options`.
        return
    means = dict.fromkeys(("loss", *metrics), 0.5)
    for name, value in config.validation_metrics.items():
        rule = f"validation_metrics[{name!r}] is a float, computed from the loss and the metrics of forward()"
        result = findings.attempt(rule, partial(value, means))
        findings.expect(result is None or isinstance(result, float), rule, result)
    strange = sorted(config.larger_is_better - config.validation_metrics.keys())
    findings.expect(not strange, "larger_is_better names only validation_metrics", ", ".join(strange))


def _check_sums(findings: Findings, config: PolicyConfig, module: Any, samples: Sequence[Sample]) -> None:
    """Check contract 4: splitting samples over ranks and micro batches must not change the loss."""
    module.eval()  # With dropout, the loss would differ between batches.

    def sums(part: Sequence[Sample]) -> torch.Tensor:
        with torch.no_grad():
            out = module(config.collate(part))
        if out.sample_losses is not None and len(part) == len(samples):
            _check_sample_losses(findings, out, len(part))
        return torch.stack([out.loss_sum, out.weight]).double()

    both = findings.attempt(
        "forward() takes batches of any size", lambda: (sums(samples), sums(samples[:1]) + sums(samples[1:]))
    )
    if both is None:
        return
    for name, whole, parts in zip(("loss_sum", "weight"), *(one.tolist() for one in both), strict=True):
        rule = f"{name} of a batch is the sum over its parts (contract 4)"
        findings.expect(abs(whole - parts) <= RTOL * abs(whole), rule, f"{whole:.6g}, the parts sum to {parts:.6g}")


def _check_sample_losses(findings: Findings, out: Any, count: int) -> None:
    """Check each sample's contribution, from which the losses of a mixture's sources are computed."""
    losses = out.sample_losses
    form = f"float32 [{count}, 2] without gradient"
    if findings.expect(_form(losses) == form, f"sample_losses are {form}", _form(losses)):
        close = torch.allclose(losses.sum(0), torch.stack([out.loss_sum, out.weight]), rtol=RTOL, atol=0.0)
        findings.expect(close, "sample_losses add up to loss_sum and weight", losses.sum(0).tolist())


def _check_actions(findings: Findings, module: Any, batch: Mapping[str, Any]) -> None:
    module.eval()
    if not findings.expect("noise" in batch, "a batch of a policy with actions contains `noise`"):
        return

    def act(observed: Mapping[str, Any]) -> torch.Tensor:
        with torch.no_grad():
            actions: torch.Tensor = module.sample_actions(observed, batch["noise"])
        return actions

    actions = findings.attempt("sample_actions() works", lambda: act(batch))
    if actions is None:
        return
    noise = batch["noise"]
    good = isinstance(actions, torch.Tensor) and actions.shape == noise.shape and actions.dtype == torch.float32
    rule = f"sample_actions() gives float32 {list(noise.shape)}, the noise's shape"
    if findings.expect(good, rule, _form(actions)):
        findings.expect(bool(actions.isfinite().all()), "sampled actions are finite")
        rule = "sample_actions() is a function of observation and noise only"
        if findings.expect(torch.equal(actions, act(batch)), rule) and "actions" in batch:
            blind = act({**batch, "actions": torch.zeros_like(batch["actions"])})
            findings.expect(torch.equal(actions, blind), "sample_actions() ignores the actions in the batch")


def _check_continuation(findings: Findings, config: PolicyConfig, module: Any, batch: Mapping[str, Any]) -> None:
    """Check each way of real-time chunking that the config offers."""
    ways, noise = config.continuation_ways(), batch.get("noise")
    if not ways or noise is None:
        return
    if not findings.expect(hasattr(module, "continue_actions"), "with continuation_ways(), has continue_actions()"):
        return
    size, horizon = noise.shape[:2]
    given = torch.linspace(-1, 1, noise.numel()).view_as(noise)
    for way, longest in ways.items():
        delay = min(longest, horizon)
        delays, trained = torch.full((size,), delay), way == "trained"
        previous = PreviousActions(given, delays, torch.ones(size, horizon), torch.full((size,), 5.0), trained)

        def act(previous: PreviousActions = previous) -> torch.Tensor:
            with torch.no_grad():
                actions: torch.Tensor = module.continue_actions(batch, noise, previous)
            return actions

        actions = findings.attempt(f"continue_actions() works ({way})", act)
        if actions is None:
            continue
        form = f"float32 {list(noise.shape)} without gradient"
        if findings.expect(_form(actions) == form, f"continue_actions() gives {form} ({way})", _form(actions)):
            findings.expect(bool(actions.isfinite().all()), f"continued actions are finite ({way})")
            kept = not trained or torch.equal(actions[:, :delay], given[:, :delay])
            findings.expect(kept, "continue_actions() keeps the actions that are given (trained)")


def _leaves(batch: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in batch.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def _is_scalar(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim == 0 and value.dtype == torch.float32


def _form(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    gradient = " with" if value.requires_grad else " without"
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}{gradient} gradient"
