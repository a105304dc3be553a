"""CUDA tensors and a process group of any size, in one process without a GPU: shapes, dtypes and devices, no values.

Torch's fake tensors know their device, so that code takes the branches that it takes on CUDA, and an operation that
mixes devices fails. Two things need a driver all the same: streams and events, for which there are stand-ins here, and
autograd's engine, which asks each tensor for its device to choose a stream. The engine asks in C++ and gets the CPU;
everything in Python asks the attribute, and gets CUDA. The process group is torch's own `fake` backend, in which every
collective returns at once.
"""

from __future__ import annotations

import sys
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from rlinf_core.errors import UserError
from rlinf_core.torch_names import (
    TorchDispatchMode,
    changes_arguments,
    fake_store,
    fake_tensors,
    forget_meshes,
    fsdp_parameters,
    in_backward,
    outside_fake_tensors,
    tree_leaves,
    tree_map,
)
from rlinf_core.training.state import build, ema
from rlinf_core.training.state.fsdp import ranks_mesh

CUDA = torch.device("cuda", 0)
_CPU = torch.device("cpu")
_TRUTH = "truth_of_zeros"
_KNOWN = "known"
_FEW = 1 << 16
"""Largest number of integers that are kept; a batch's images have more."""
_UNBIND = torch.ops.aten.unbind.int
_READ = torch.ops.aten._local_scalar_dense.default
_FRAMEWORK = (Path(torch.__file__).parent, Path(__file__).parent)
_STANDARD_LIBRARY = Path(sysconfig.get_path("stdlib"))
"""Code that is not named as the place of a mistake."""


@contextmanager
def fake_cuda(rank: int, ranks: int) -> Iterator[Values]:
    """Let torch believe in a CUDA device and in so many ranks, of which this process is one, while the body runs.

    Raises:
        UserError: This process is already part of a process group.
    """
    if dist.is_initialized():
        raise UserError("a rehearsal needs a process of its own: this one has already joined a process group")
    with ExitStack() as stack:
        for patch in _patches():
            stack.enter_context(patch)
        dist.init_process_group("fake", store=fake_store(), rank=rank, world_size=ranks)
        stack.callback(forget_meshes)  # An equal mesh of another rank has other groups.
        stack.callback(dist.destroy_process_group)
        stack.enter_context(fake_tensors().FakeTensorMode(allow_non_fake_inputs=True))
        values, fake = stack.enter_context(Values()), fake_tensors().FakeTensor
        stack.enter_context(mock.patch.object(fake, "tolist", values.counting_once(fake.tolist)))
        yield values


class Values(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Answers when code reads a number on the host, and counts the lines that do: there, it would wait for a device.

    As no tensor has values, every floating-point number is 0, and a truth value is what follows from that: 0 is finite,
    not NaN and not below 0. Integers and truth values that follow from those of the batch are what they are: where
    documents begin, for example. Other integers have no answer, as sizes would follow from them.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.waits: Counter[str] = Counter()
        """`.item()` and the like on CUDA tensors, by the line that asks."""

    def counting_once(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function that reads many numbers in one copy, such as `tolist`: the host waits once, not for each."""

        def call(*args: Any) -> Any:
            before = self.waits.copy()
            out = function(*args)
            self.waits = before + Counter(dict.fromkeys(self.waits - before, 1))
            return out

        return call

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _READ and isinstance(args[0], fake_tensors().FakeTensor):
            if args[0].device.type == "cuda":
                self.waits[place()] += 1
            if (known := _known(args[0])) is not None:
                with outside_fake_tensors():
                    return known.item()
            if args[0].dtype == torch.bool:
                return getattr(args[0], _TRUTH, False)
            if args[0].is_floating_point():
                return 0.0
        if func.name().startswith("aten::_fused_"):  # Optimizers in one kernel, which change in place what they get.
            return None
        if in_backward() and kwargs.get("device") == _CPU:
            kwargs = {**kwargs, "device": CUDA}  # Formulas of gradients, which ask for the device in C++.
        out = func(*args, **kwargs)
        if isinstance(out, torch.Tensor) and out.dtype == torch.bool:
            setattr(out, _TRUTH, _of_zeros(func, args, kwargs))
        if isinstance(out, fake_tensors().FakeTensor) or func is _UNBIND:
            _keep(out, func, args, kwargs)
        return out


def _known(tensor: torch.Tensor) -> torch.Tensor | None:
    """A tensor's integers or truth values, on the host; None if it has others, or they follow from what has none."""
    if tensor.is_floating_point() or tensor.is_complex() or tensor.numel() > _FEW:
        return None
    if type(tensor) is torch.Tensor:
        return tensor if tensor.device == _CPU else None
    value, version = getattr(tensor, _KNOWN, (None, 0))
    return value if value is not None and tensor._version == version else None  # Not if changed in place since.


def _keep(out: Any, func: Any, args: Any, kwargs: Any) -> None:
    """Compute an operation's integers or truth values on the host, if all that it takes is known there."""
    results = [out] if isinstance(out, torch.Tensor) else list(out)
    random = torch.Tag.nondeterministic_seeded in func.tags
    if random or changes_arguments(func) or any(one.is_floating_point() for one in results):
        return
    taken = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
    known = {id(one): _known(one) for one in taken}
    if not known or any(value is None for value in known.values()):
        return
    try:
        values = _on_host(func, args, kwargs, lambda one: known[id(one)])
    except Exception:  # An operation that the host does not have: its result stays unknown.
        return
    for one, value in zip(results, [values] if isinstance(out, torch.Tensor) else values, strict=True):
        setattr(one, _KNOWN, (value, one._version))


def _of_zeros(func: Any, args: Any, kwargs: Any) -> bool:
    """The truth value of an operation, if every number were 0; False if that cannot be said."""

    def zero(one: torch.Tensor) -> torch.Tensor:
        return torch.full((), getattr(one, _TRUTH, 0), dtype=one.dtype, device="cpu")

    try:
        with outside_fake_tensors():
            return bool(_on_host(func, args, kwargs, zero))
    except Exception:
        return False


def _on_host(func: Any, args: Any, kwargs: Any, value: Callable[[torch.Tensor], Any]) -> Any:
    """An operation's result for other tensors, on the host."""

    def swap(one: Any) -> Any:
        return value(one) if isinstance(one, torch.Tensor) else one

    if "device" in kwargs:
        kwargs = {**kwargs, "device": _CPU}
    with outside_fake_tensors():
        return func(*tree_map(swap, args), **tree_map(swap, kwargs))


def place(start: FrameType | None = None) -> str:
    """The innermost line of code below here that is neither torch's nor the rehearsal's: `pi0.py:120`."""
    frame = start or sys._getframe(1)
    while frame.f_back is not None and _is_framework(frame.f_code.co_filename):
        frame = frame.f_back
    return named_line(frame.f_code.co_filename, frame.f_lineno)


def place_of(error: BaseException) -> str:
    """The innermost line of an error's traceback that is neither torch's nor the rehearsal's."""
    found, step = "", error.__traceback__
    while step is not None:
        if not _is_framework(step.tb_frame.f_code.co_filename):
            found = named_line(step.tb_frame.f_code.co_filename, step.tb_lineno)
        step = step.tb_next
    return found


def named_line(file: str, line: int) -> str:
    """A line of code in a message, with the file's last two names."""
    return f"{'/'.join(Path(file).parts[-2:])}:{line}"


def _is_framework(file: str) -> bool:
    path = Path(file)
    standard = path.is_relative_to(_STANDARD_LIBRARY) and "site-packages" not in path.parts
    return file.startswith("<") or standard or any(path.is_relative_to(folder) for folder in _FRAMEWORK)


def _patches() -> Iterator[Any]:
    fake = fake_tensors()
    answers = {torch.ops.prim.device.default: lambda _: _CPU}
    yield mock.patch.dict(fake._DISPATCH_META_HANDLERS, answers)  # What C++ gets.
    yield mock.patch.object(fake, "init_gpu_context", _nothing)
    yield mock.patch.object(fake.FakeTensor, "is_cuda", property(lambda one: one.device.type == "cuda"), create=True)
    yield mock.patch.object(fake.FakeTensor, "is_meta", property(lambda one: one.device.type == "meta"), create=True)
    yield mock.patch.object(DTensor, "device", property(lambda one: one._local_tensor.device), create=True)
    yield mock.patch.object(DTensor, "is_cuda", property(lambda one: one._local_tensor.is_cuda), create=True)
    stand_ins: dict[str, Any] = {
        "Stream": Stream,
        "Event": Event,
        "current_stream": Stream,
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "stream": lambda _: nullcontext(),
        "set_device": _nothing,
        "synchronize": _nothing,
        "manual_seed": _nothing,
    }
    yield mock.patch.object(torch.Tensor, "record_stream", _nothing)
    for name, stand_in in stand_ins.items():
        yield mock.patch.object(torch.cuda, name, stand_in)
    yield mock.patch.object(fsdp_parameters(), "_chunk_with_empty", Shards)
    yield mock.patch.object(ema, "ThreadPoolExecutor", InTurn)  # Another thread would not be in these contexts.
    yield mock.patch.object(build, "ranks_mesh", _with_values(ranks_mesh))


def _with_values(function: Callable[..., Any]) -> Callable[..., Any]:
    """A device mesh is a tensor of ranks, whose values are needed."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with outside_fake_tensors():
            return function(*args, **kwargs)

    return call


def _nothing(*_: Any, **__: Any) -> None:
    """Takes anything and does nothing."""


class Shards(Sequence[torch.Tensor]):
    """A parameter in as many shards as there are ranks, as FSDP cuts it; one is cut only when asked for.

    FSDP asks for the first and the rank's own, and would cut a thousand of each parameter for a thousand ranks, which
    takes a rehearsal minutes.
    """

    def __init__(self, tensor: torch.Tensor, num_chunks: int, dim: int) -> None:
        self._tensor, self._shards, self._dim = tensor, num_chunks, dim

    def __len__(self) -> int:
        return self._shards

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(len(self)))]
        size = self._tensor.size(self._dim)
        length = -(-size // self._shards)
        start = range(self._shards)[index] * length
        if start >= size > 0:
            return self._tensor.new_empty(0)
        return self._tensor.narrow(self._dim, start, min(length, size - start))


class InTurn:
    """A pool of threads that does at once what it is given."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def submit(self, function: Callable[[], Any]) -> Future[Any]:
        """Call the function; returns its result."""
        done: Future[Any] = Future()
        done.set_result(function())
        return done


class Stream:
    """A stream that runs nothing."""

    device = CUDA

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait_stream(self, _: Any) -> None:
        """Everything has happened already."""

    wait_event = wait_stream

    def synchronize(self) -> None:
        """Everything has happened already."""

    def record_event(self, event: Event | None = None) -> Event:
        """An event that has happened."""
        return event or Event()


class Event:
    """An event that has happened."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def record(self, *_: Any) -> None:
        """Has happened."""

    wait = synchronize = record

    def query(self) -> bool:
        """Whether it has happened."""
        return True

    def elapsed_time(self, _: Any) -> float:
        """Milliseconds: none."""
        return 0.0
