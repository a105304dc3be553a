"""The cost of a forward and a backward pass, counted without computing them: operations, and bytes alive over time.

Torch and the standard library only. A policy runs its own code on the meta device, so that any policy can be counted
without a formula. Floating-point tensors and images have shapes only; integers and booleans (masks, tokens, lengths)
keep their values, so that code which selects by a mask or loops over lengths runs as it does in training.

Fused attention is counted as in CUDA's flash kernel, whatever its mask: it saves queries, keys, values, output and one
number per query and head. By convention it has two matrix products forward and four backward.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode

from rlinf_core.torch_names import (
    EXPENSIVE,
    FLASH,
    FLASH_BACKWARD,
    VARLEN,
    VARLEN_BACKWARD,
    TorchDispatchMode,
    attention_spelt_out,
    flash_attention,
    flop_registry,
    implemented,
    name_of,
    packet_of,
    shares_memory,
    storage_address,
    tree_leaves,
    tree_map,
)

_aten = torch.ops.aten
_META = torch.device("meta")


@dataclass(frozen=True)
class Counted:
    """One forward and backward pass over a batch."""

    forward_flops: int
    """Operations, two for each multiply-add of a matrix product, a convolution or attention."""
    flops: int
    """Operations of both passes, recomputation included."""
    saved_bytes: int
    """Alive after the forward pass: what the backward pass needs besides parameters and the batch."""
    peak_bytes: int
    """The most bytes alive at once, without gradients of parameters."""
    moments: tuple[tuple[str, int], ...] = field(repr=False)
    """In the order in which parameters get their gradients: name, most bytes alive since the previous one."""
    flops_by_operation: Mapping[str, int] = field(repr=False)


def count(policy: Any, batch: Mapping[str, Any], *, compiled: Sequence[torch.nn.Module] = ()) -> Counted:
    """Count one training pass of a policy over a batch.

    Args:
        policy: On the meta device, each parameter in the dtype in which it is gathered (`cast_as_gathered`).
        batch: From `collate`, on the CPU.
        compiled: Blocks that keep for the backward pass what they keep when compiled, see `_CompiledBlock`.

    Raises:
        RuntimeError: The policy reads the value of a floating-point tensor (`.item()`), which does not exist here.
    """
    named = {id(parameter): name for name, parameter in policy.named_parameters()}
    batch = tree_map(_without_values, dict(batch))
    meter = _Meter(policy, batch)
    moments: list[tuple[str, int]] = []

    def received(parameter: torch.Tensor) -> None:
        moments.append((named[id(parameter)], meter.take_peak()))
        parameter.grad = None  # As in sharded training, where the gradient is reduced and freed immediately.

    hooks = [p.register_post_accumulate_grad_hook(received) for p in policy.parameters() if p.requires_grad]
    was_training = policy.training
    policy.train()
    try:
        blocks = _as_if_compiled(compiled, meter)
        attention = implemented("scaled_dot_product_attention", _as_on_cuda, "AutogradMeta")
        with attention, blocks, _KeptIntegers(), meter:
            loss = policy(batch).loss_sum
            forward, saved = meter.flops, meter.alive
            peaks = [meter.take_peak()]
            torch.autograd.backward(loss)
            rest = meter.take_peak()
    finally:
        policy.train(was_training)
        for hook in hooks:
            hook.remove()
    if moments:  # The forward pass's peak counts until the first gradient.
        moments[0] = (moments[0][0], max(moments[0][1], peaks[0]))
    peak = max([*peaks, rest, *(peak for _, peak in moments)])
    return Counted(forward, meter.flops, saved, peak, tuple(moments), dict(meter.by_operation))


def cast_as_gathered(groups: Mapping[torch.dtype, list[torch.nn.Parameter]]) -> None:
    """Give parameters on the meta device the dtype in which they are gathered."""
    for dtype, parameters in groups.items():
        for parameter in parameters:
            parameter.data = parameter.data.to(dtype)


def _without_values(value: Any) -> Any:
    """Move floating-point tensors and images to the meta device, without their values."""
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(_META) if value.is_floating_point() or value.dtype == torch.uint8 else value


class _KeptIntegers(TorchFunctionMode):
    """Keeps the values of integers and booleans that code makes on, or moves to, the device of what it computes.

    The lengths of an image's windows are such numbers, and the mask of the tokens that stand for images.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.tensor and torch.device(kwargs.get("device") or "cpu").type == "meta":
            made = torch.tensor(*args, **(kwargs | {"device": "cpu"}))
            return made.to(_META) if made.is_floating_point() else made
        if func is torch.Tensor.to and not args[0].is_meta and not args[0].is_floating_point():
            kwargs.pop("device", None)
            rest = [one for one in args[1:] if not isinstance(one, torch.device | str)]
            return func(args[0], *rest, **kwargs) if rest or kwargs else args[0]
        return func(*args, **kwargs)


class _Form(NamedTuple):
    """Everything needed to create a tensor without values."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


class _Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sums operations, and tracks how many bytes on the meta device are alive."""

    def __init__(self, policy: Any, batch: Mapping[str, Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0
        self.by_operation: dict[str, int] = {}
        self.alive = 0
        self._peak = 0
        tensors = [*policy.parameters(), *policy.buffers(), *tree_leaves(batch)]
        self._known = {storage_address(t.untyped_storage()) for t in tensors if isinstance(t, torch.Tensor)}
        self._known_results: dict[Any, tuple[Any, int]] = {}
        self.block: _CompiledBlock | None = None
        """The block that is in its forward pass."""
        self._kept = tensors  # Keeps their storages alive, so that no other storage reuses an address.

    def take_peak(self) -> int:
        """The most bytes alive since the last call."""
        peak, self._peak = max(self._peak, self.alive), self.alive
        return peak

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not any(leaf.is_meta for leaf in _tensors((args, kwargs))):
            made = func(*args, **kwargs)
            out = tree_map(_floats_on_meta, made) if any(t.is_floating_point() for t in _tensors(made)) else made
        else:
            out = self._call(func, args, kwargs)
        for tensor in _tensors(out):
            if tensor.is_meta:
                self._follow(tensor.untyped_storage())
        if self.block is not None and func in EXPENSIVE:
            self.block.touch(_tensors(args), _tensors(out))
        return out

    def _call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operation on the meta device; results are cached by operation and shapes.

        Torch infers shapes in Python, about a millisecond each, and a model has many equal blocks.
        """
        name = name_of(func)
        formula: Any = _ATTENTION.get(name) or flop_registry.get(packet_of(func))
        given = args  # With the values of integers and booleans.
        args, kwargs = _all_on_meta(func, args, kwargs)
        key = (func, _signature(args), _signature(kwargs)) if _makes_new(func) else None
        if key is None or key not in self._known_results:
            out = func(*args, **kwargs)
            flops = formula(*given, **kwargs, out_val=out) if formula is not None else 0
            if key is not None:
                self._known_results[key] = _forms(out), flops
        else:
            forms, flops = self._known_results[key]
            out = _of_forms(forms)
        if flops:
            self.flops += flops
            self.by_operation[name] = self.by_operation.get(name, 0) + flops
        return out

    def _follow(self, storage: Any) -> None:
        address = storage_address(storage)
        if address in self._known:
            return
        size = storage.nbytes()
        self._known.add(address)
        self.alive += size
        self._peak = max(self._peak, self.alive)
        weakref.finalize(storage, self._forget, address, size)

    def _forget(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.alive -= size


class _CompiledBlock:
    """Keeps what torch.compile would keep of one call of a block, among what autograd saves.

    Its partitioner computes pointwise operations again in the backward pass, in the kernels that need them. It keeps
    the block's inputs, and inputs and results of matrix products and attention.
    """

    def __init__(self, meter: _Meter, inputs: Iterable[torch.Tensor]) -> None:
        self._meter = meter
        self._kept = list(inputs)
        self._touched: set[int] = set()
        self._saved: list[_Saved] = []
        meter.block = self

    def touch(self, inputs: Iterable[torch.Tensor], results: Iterable[torch.Tensor]) -> None:
        """Note the inputs and results of a matrix product or attention."""
        self._touched |= {storage_address(one.untyped_storage()) for one in inputs if one.is_meta}
        self._kept += [one for one in results if one.is_meta]

    def pack(self, tensor: torch.Tensor) -> _Saved | torch.Tensor:
        """What autograd stores instead of a saved tensor."""
        if not tensor.is_meta:  # Lengths and indices, which are small, and whose values count.
            return tensor
        self._saved.append(_Saved(self, tensor))
        return self._saved[-1]

    @staticmethod
    def unpack(saved: _Saved | torch.Tensor) -> torch.Tensor:
        """The saved tensor, or another like it."""
        if isinstance(saved, torch.Tensor):
            return saved
        remade: torch.Tensor = _of_forms(saved.form) if saved.tensor is None else saved.tensor
        return remade

    def finish(self) -> None:
        """Drop what would be computed again, at the end of the block's forward pass."""
        stay = self._touched | {storage_address(one.untyped_storage()) for one in self._kept}
        for saved in self._saved:
            if saved.tensor is not None and storage_address(saved.tensor.untyped_storage()) not in stay:
                saved.tensor = None
        self._saved, self._meter.block = [], None


class _Saved:
    """A tensor that autograd saves for a block's backward pass."""

    def __init__(self, block: _CompiledBlock, tensor: torch.Tensor) -> None:
        self.block = block  # Which lives, with all that it keeps, until autograd's graph is freed.
        self.form = _forms(tensor)
        self.tensor: torch.Tensor | None = tensor


@contextmanager
def _as_if_compiled(blocks: Sequence[torch.nn.Module], meter: _Meter) -> Iterator[None]:
    """Let blocks keep what they would keep when compiled."""
    before = [block.forward for block in blocks]

    def compiled(forward: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            inputs = (one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor) and one.is_meta)
            one = _CompiledBlock(meter, inputs)
            with torch.autograd.graph.saved_tensors_hooks(one.pack, one.unpack):
                out = forward(*args, **kwargs)
            one.finish()
            return out

        return call

    for block, forward in zip(blocks, before, strict=True):
        block.forward = compiled(forward)
    try:
        yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            block.forward = forward


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in arguments or results."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for one in value:
            yield from _tensors(one)
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))


@functools.cache
def _makes_new(func: Any) -> bool:
    """Whether an operation neither changes its arguments nor returns views of them."""
    return name_of(func) not in _BY_VALUE and not shares_memory(func)


def _signature(value: Any) -> Any:
    """What the shape of an operation's result can depend on, given tensors without values."""
    if isinstance(value, torch.Tensor):
        return value.shape, value.stride(), value.dtype
    if isinstance(value, tuple | list):
        return tuple(map(_signature, value))
    if isinstance(value, dict):
        return tuple((name, _signature(one)) for name, one in value.items())
    return type(value), value  # 1, 1.0 and True are equal but give different dtypes.


def _forms(out: Any) -> Any:
    if isinstance(out, torch.Tensor):
        return _Form(tuple(out.shape), out.stride(), out.dtype)
    return type(out)(map(_forms, out)) if isinstance(out, tuple | list) else out


def _of_forms(form: Any) -> Any:
    if isinstance(form, _Form):
        return torch.empty_strided(form.shape, form.stride, dtype=form.dtype, device=_META)
    return type(form)(map(_of_forms, form)) if isinstance(form, tuple | list) else form


def _all_on_meta(func: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """An operation's arguments on the meta device; boolean masks become the indices they select."""
    if func in _INDEXING:
        args = (args[0], [index for mask in args[1] for index in _selected(mask)], *args[2:])
    if kwargs.get("device") is not None:
        kwargs = {**kwargs, "device": _META}
    if all(tensor.is_meta for tensor in _tensors((args, kwargs))):
        return args, kwargs
    moved: tuple[Any, Any] = tree_map(_on_meta, (args, kwargs))
    return moved


def _selected(index: Any) -> list[Any]:
    if isinstance(index, torch.Tensor) and index.dtype == torch.bool and not index.is_meta:
        return list(index.nonzero(as_tuple=True))
    return [index]


def _on_meta(value: Any) -> Any:
    return value.to(_META) if isinstance(value, torch.Tensor) and not value.is_meta else value


def _floats_on_meta(value: Any) -> Any:
    floats = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.to(_META) if floats else value


def _as_on_cuda(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **others: Any,
) -> torch.Tensor:
    """Attention on the meta device by CUDA's flash kernel; torch would decompose it into single operations."""
    if query.ndim != 4 or query.shape[-1] != value.shape[-1]:
        return attention_spelt_out(query, key, value, attn_mask, dropout_p, is_causal, **others)
    return flash_attention(query, key, value, is_causal=is_causal)


def _attention_forward(query: torch.Tensor, key: torch.Tensor, *_: Any, **__: Any) -> int:
    """Scores, and their product with the values; key heads shared by several queries count once per query head."""
    return 4 * query.numel() * key.shape[-2]


def _attention_backward(_: torch.Tensor, query: torch.Tensor, key: torch.Tensor, *__: Any, **___: Any) -> int:
    """Four products; the kernel's recomputation of the scores saves memory and does not count."""
    return 8 * query.numel() * key.shape[-2]


def _end_to_end_forward(
    query: torch.Tensor, key: torch.Tensor, _: Any, starts: Any, key_starts: Any, *__: Any, **___: Any
) -> int:
    """The same for packed sequences: queries [T, N, D], and the start of each sequence."""
    return 4 * query.shape[1] * query.shape[2] * _pairs(starts, key_starts)


def _end_to_end_backward(_: Any, query: torch.Tensor, *others: Any, **__: Any) -> int:
    starts, key_starts = others[4:6]
    return 8 * query.shape[1] * query.shape[2] * _pairs(starts, key_starts)


def _pairs(starts: torch.Tensor, key_starts: torch.Tensor) -> int:
    return int((starts.diff().to(torch.int64) * key_starts.diff().to(torch.int64)).sum())


_ATTENTION = {
    FLASH: _attention_forward,
    FLASH_BACKWARD: _attention_backward,
    VARLEN: _end_to_end_forward,
    VARLEN_BACKWARD: _end_to_end_backward,
}
_BY_VALUE = frozenset({VARLEN, VARLEN_BACKWARD})
"""Operations whose cost depends on values and not on shapes alone."""
_INDEXING = frozenset({_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default})
