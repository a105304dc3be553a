"""Build what trains: the policy, sharded and with its weights, its optimizer and its moving average."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from rlinf_core.contract.module import LocatedWeights, ShardUnit, WeightSource
from rlinf_core.contract.optim import TrainedParameter
from rlinf_core.contract.policy import PolicyConfig
from rlinf_core.contract.process_group import ProcessGroup
from rlinf_core.contract.run import LoadedPlugins, RunConfig
from rlinf_core.errors import UserError
from rlinf_core.lora.apply import WithTrainedModules
from rlinf_core.lora.files import AdapterFiles, check_base
from rlinf_core.training.settings import Fsdp2Settings
from rlinf_core.training.state.adapters import Adapters, Original, find_adapters
from rlinf_core.training.state.blocks import Checkpointing, Compilation, prepare_block
from rlinf_core.training.state.ema import Ema
from rlinf_core.training.state.fsdp import derived_seed, layout, materialize, ranks_mesh, shard, unused_parameters
from rlinf_core.training.state.optim import Optimizer, decays

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True, eq=False)
class TrainState:
    """What a step changes and a checkpoint holds."""

    policy: Any
    """The sharded policy; see `contract.module.Policy`."""
    optimizer: Optimizer
    ema: Ema | None
    """The moving average of the weights; None if `optim.ema_decay` is 0."""
    parameters: Mapping[str, nn.Parameter]
    """The sharded parameters: while they are gathered, the policy shows the gathered ones, in the compute dtype."""
    adapters: Adapters
    """What plugins have added to the policy."""
    compilation: Compilation | None = None
    """What `torch.compile` made of its blocks; None if they are not compiled."""

    @cached_property
    def layout(self) -> str:
        """A hash of parameter names and shapes."""
        return layout(self.parameters.items())

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors of a checkpoint by `<part>.<name>`, not copied."""
        parts: dict[str, Mapping[str, torch.Tensor]] = {
            "model": {name: parameter.detach() for name, parameter in self.parameters.items()},
            "optim": self.optimizer.state_dict(),
            "ema": self.ema.state_dict() if self.ema else {},
        }
        return {f"{part}.{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}


def build_state(
    run: RunConfig,
    config: Fsdp2Settings,
    group: ProcessGroup,
    plugins: LoadedPlugins,
    weights: WeightSource | None,
    *,
    filled: bool = True,
    to_count: bool = False,
) -> TrainState:
    """Build the policy, its optimizer and its moving average; see `build_policy`."""
    compilation = Compilation() if config.compiles(group.device.type) else None
    policy, adapters = build_policy(
        run, config, group, plugins, weights, filled=filled, to_count=to_count, compilation=compilation
    )
    optimizer, ema = build_optimizer(run, policy), build_ema(run, config, policy)
    if compilation is not None and not compilation.blocks:
        compilation = None
    return TrainState(policy, optimizer, ema, dict(policy.named_parameters()), adapters, compilation)


def open_weights(run: RunConfig) -> WeightSource | None:
    """The pretrained weights to start from; None to start from the policy's initial values."""
    check_base(run.policy.lora, run.policy.weights)
    return opened_weights(run.policy) if run.policy.weights not in ("", "random") else None


def opened_weights(policy: PolicyConfig, *, only_adapters: bool = False) -> WeightSource:
    """A policy's pretrained weights, with the modules that were trained whole beside the adapters it continues from.

    With `only_adapters`, only these modules can be read.
    """
    weights = None if only_adapters else policy.open_weights()
    if policy.lora is not None and policy.lora.weights:
        return WithTrainedModules(weights, AdapterFiles.open(policy.lora.weights), policy)
    assert weights is not None
    return weights


def build_on_meta(run: RunConfig, plugins: LoadedPlugins, *, to_count: bool = False) -> tuple[Any, Adapters]:
    """The policy on the meta device, after plugins' changes, and what they have added to it.

    With `to_count`, it is built without reading the policy's files.
    """
    with torch.device("meta"):
        policy: Any = run.policy.build_to_count() if to_count else run.policy.build()
        before = Original.of(policy)
        if run.policy.lora is not None:
            run.policy.add_lora(policy)
        plugins.hook.rlinf_policy_built(policy=policy, run=run)
    adapters = find_adapters(before, policy, lambda: _owners(plugins))
    _refuse_saved_buffers(run, policy)
    return policy, adapters


def _owners(plugins: LoadedPlugins) -> str:
    """The plugins that may have changed a policy."""
    return " or ".join(str(one.owner) for one in plugins.implementations("rlinf_policy_built"))


def build_policy(
    run: RunConfig,
    config: Fsdp2Settings,
    group: ProcessGroup,
    plugins: LoadedPlugins,
    weights: WeightSource | None,
    *,
    filled: bool = True,
    to_count: bool = False,
    compilation: Compilation | None = None,
) -> tuple[Any, Adapters]:
    """Build the policy, shard it, and give it its weights: pretrained, or (`weights` is None) its initial values.

    What plugins have added gets its initial values from its adapters in both cases. If not `filled`, all parameters are
    left uninitialised, for a checkpoint to load. With `to_count`, the policy's files are not read (`rlinf rehearse`).
    With a `compilation`, blocks are compiled, and it learns of them.
    """
    policy, adapters = build_on_meta(run, plugins, to_count=to_count)
    if weights is not None:
        shapes = {name: tuple(parameter.shape) for name, parameter in policy.named_parameters()}
        weights.check(adapters.without_added(shapes))
    # Unused parameters never change without decay: no average of them is needed.
    if not decays(run.optim.lr, run.optim.unused_weight_decay):
        for name in unused_parameters(policy):
            policy.get_parameter(name).requires_grad_(False)
    prepare_blocks(run, policy, config.activation_checkpointing, compilation, wanted=config.asks_for_blocks)
    shard(
        policy,
        ranks_mesh(group.device.type, group.size, config.replicas(group.size, 1)),
        compute_dtype=DTYPES[config.param_dtype],
        reshard_after_forward=config.reshard_after_forward,
        min_unit_size=config.min_unit_size,
        cpu_offload=config.cpu_offload,
    )

    def value(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if name in adapters.owners:
            return adapters.initial_value(run.seed, name, shape)
        if weights is not None:
            return finite_tensor(weights, name, run.policy)
        return initial_value(run.policy, policy, run.seed, name, shape)

    home = torch.device("cpu") if config.cpu_offload else group.device
    materialize(policy, home, value if filled else None, buffers_on=group.device)
    adapters.rebuild_buffers()
    return policy, adapters


def finite_tensor(weights: WeightSource, name: str, config: PolicyConfig) -> torch.Tensor:
    """A pretrained tensor; raises `UserError` that names file and tensor if it contains NaN or infinity.

    Found only in training, such a number looks like a learning rate that is too high.
    """
    tensor = weights.tensor(name)
    if not tensor.numel() or all(torch.isfinite(extreme) for extreme in tensor.aminmax()):
        return tensor
    parts = config.published_parts(name) or {config.published_name(name): len(tensor) if tensor.ndim else 1}
    found = []
    rows = torch.split(tensor if tensor.ndim else tensor[None], [*parts.values()])
    for published, part in zip(parts, rows, strict=True):
        counts = {"NaN": int(part.isnan().sum()), "infinite": int(part.isinf().sum())}
        if said := " and ".join(f"{count} {what}" for what, count in counts.items() if count):
            found.append(f"{published} has {said} of {part.numel()} numbers")
    where = weights.file_of(name) if isinstance(weights, LocatedWeights) else config.weights
    raise UserError(
        f"policy.weights: {where} contains numbers that are not finite: {'; '.join(found)}. The file is damaged, comes "
        "from a run that diverged, or was cast to float16, whose largest number is 65504: use other weights, or "
        "convert them again from their source in float32 or bfloat16"
    )


def initial_value(config: PolicyConfig, policy: Any, seed: int, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The initial value of a full parameter: each published tensor in it has its own generator (contract 2)."""

    def value(published: str, shape: tuple[int, ...]) -> torch.Tensor:
        generator = torch.Generator().manual_seed(derived_seed(seed, published))
        initial: torch.Tensor = policy.initial_value(name, shape, generator)
        return initial

    if parts := config.published_parts(name):
        return torch.cat([value(published, (rows, *shape[1:])) for published, rows in parts.items()])
    return value(config.published_name(name), shape)


def build_optimizer(run: RunConfig, policy: Any) -> Optimizer:
    """The optimizer of a sharded policy, with the settings in `[optim]`."""
    optim = run.optim
    unused = unused_parameters(policy)
    trained = [one for one in described_parameters(run.policy, policy) if one.parameter.requires_grad]
    return Optimizer(
        [one for one in trained if one.name not in unused],
        optim,
        optim.lr_at,
        clip_grad=optim.clip_grad,
        unused=[one.parameter for one in trained if one.name in unused],
        described=f"optim.type = {optim.type!r} ({optim.optimizer_origin})",
    )


def described_parameters(config: PolicyConfig, policy: Any) -> list[TrainedParameter]:
    """All parameters of a policy, with what an optimizer may want to know of them."""
    blocks = [unit.module for unit in policy.shard_units() if unit.block]
    inside = {id(parameter) for block in blocks for parameter in block.parameters()}
    return [
        TrainedParameter(name, parameter, id(parameter) in inside, config.published_parts(name))
        for name, parameter in policy.named_parameters()
    ]


def build_ema(run: RunConfig, config: Fsdp2Settings, policy: Any) -> Ema | None:
    """The moving average of a sharded policy, starting from its weights; None if `optim.ema_decay` is 0."""
    if not run.optim.ema_decay:
        return None
    return Ema(policy, run.optim.ema_decay, torch.device("cpu") if config.ema_device == "cpu" else None)


def _refuse_saved_buffers(run: RunConfig, policy: Any) -> None:
    if unfilled := sorted(policy.state_dict().keys() - dict(policy.named_parameters(remove_duplicate=False)).keys()):
        raise UserError(
            f"the policy {run.policy.type!r} has buffers that checkpoints would have to save: {', '.join(unfilled)}. "
            "Register them with persistent=False and fill them in rebuild_buffers, or make them parameters"
        )


def prepare_blocks(
    run: RunConfig,
    policy: Any,
    checkpointing: Checkpointing,
    compilation: Compilation | None = None,
    *,
    wanted: bool = True,
) -> None:
    """Apply activation checkpointing, then compilation, to the policy's blocks; before sharding.

    Raises:
        UserError: The policy has no blocks, although the config asks for one of the two (`wanted`).
    """
    if checkpointing == "none" and compilation is None:
        return
    units: list[ShardUnit] = list(policy.shard_units())
    blocks = [unit.module for unit in units if unit.block]
    if not blocks and wanted:
        raise UserError(
            f"trainer.activation_checkpointing and trainer.compile work on a policy's blocks, and {run.policy.type!r} "
            "names none: its shard_units() must say ShardUnit(..., block=True)"
        )
    for block in blocks:
        prepare_block(block, checkpointing=checkpointing, compiled=compilation is not None, compilation=compilation)
