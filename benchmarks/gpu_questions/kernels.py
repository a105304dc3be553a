"""Are attention's kernels right at the model's shapes, which are fast, and how fast are matrix products?"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpu_questions.measuring import Probe, apart
from rlinf_plugins_openpi.model.attention import (
    KeysValues,
    SuffixSequences,
    attend,
    attend_jointly,
    attend_sequences,
    bias,
)
from rlinf_plugins_openpi.model.packing import Packing, pack, pack_suffix

BACKENDS = {
    "default": None,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
SUFFIXES = ((10, 0), (16, -120), (32, -120), (50, 0), (51, 0))
"""Suffix tokens, and the value of every logit: with logits near -120, cuDNN's backward pass can return NaN."""


def attention(probe: Probe, _: Any) -> None:
    """Errors against float64 and times of the suffix's, the prefix's and the image tower's attention."""
    print("torch", torch.__version__, "cudnn", torch.backends.cudnn.version(), flush=True)
    for tokens, low in SUFFIXES[:2] if probe.tiny else SUFFIXES:
        _suffix(probe, tokens, low)
    if probe.on_cuda:
        _prefix(probe)
    _vision(probe)


def _suffix(probe: Probe, tokens: int, low: int) -> None:
    """On the grid by each backend, which needs a mask, and by the kernel for packed sequences, as in training."""
    size, heads, width, images = (2, 8, 32, 16) if probe.tiny else (32, 8, 256, 512)
    generator = torch.Generator().manual_seed(tokens)
    lengths = torch.randint(8, 64, (size,), generator=generator)
    text = torch.arange(64) < lengths[:, None]
    packed = pack(torch.ones(size, 1, dtype=torch.bool), text, image_tokens=images)
    packing = Packing(**{name: one.to(probe.device) for name, one in packed.items()})
    shapes = ((size, tokens, heads), (size, tokens, 1), (size, tokens, 1), (len(packing.positions), 1))
    q, k, v, prefix_k = (torch.randn(*shape, width, generator=generator) for shape in shapes)
    prefix_v = torch.randn(prefix_k.shape, generator=generator)
    if low:
        q, k, prefix_k = 0.1 * q, 0.1 * k, 0.1 * prefix_k
        q[..., 0], k[..., 0], prefix_k[..., 0] = 1.0, low * width**0.5, low * width**0.5
    values = [one.to(probe.device, torch.bfloat16) for one in (q, k, v, prefix_k, prefix_v)]
    incoming = torch.randn(size, tokens, heads * width, generator=generator).to(probe.device, torch.bfloat16)

    def on_the_grid(given: list[torch.Tensor]) -> torch.Tensor:
        own_q, own_k, own_v, *prefix = given
        spread = [one[packing.to_grid] for one in prefix]
        visible = torch.cat((packing.valid, packing.valid.new_ones(size, tokens)), 1)[:, None, None]
        kv = KeysValues(torch.cat((spread[0], own_k), 1), torch.cat((spread[1], own_v), 1))
        return attend(own_q, kv, bias(visible, own_q.dtype))

    def packed_sequences(given: list[torch.Tensor]) -> torch.Tensor:
        sequences = SuffixSequences(pack_suffix(packing, tokens, first_alone=False), tokens, 1024)
        return attend_jointly(given[0], KeysValues(*given[3:]), KeysValues(*given[1:3]), sequences)

    def tried(function: Any, dtype: torch.dtype) -> list[torch.Tensor]:
        given = [one.detach().to(dtype).requires_grad_() for one in values]
        out = function(given)
        out.backward(incoming.to(dtype))
        real = int(packing.starts[-2])  # Without filler.
        return [out.detach(), *(one.grad[:real] if one.dim() == 3 else one.grad for one in given)]

    with sdpa_kernel(SDPBackend.MATH):
        wanted = tried(on_the_grid, torch.float64)
    ways = {name: (on_the_grid, backend) for name, backend in BACKENDS.items()}
    if probe.on_cuda:
        ways["packed"] = (packed_sequences, None)
    for name, (function, backend) in ways.items():
        where = f"suffix {tokens} logits {low} {name}"
        with sdpa_kernel(backend) if backend is not None else contextlib.nullcontext():
            try:
                got = tried(function, torch.bfloat16)
                given = [one.detach().requires_grad_() for one in values]
                forward = probe.milliseconds(lambda f=function, g=given: f(g).detach())
                both = probe.milliseconds(lambda f=function, g=given: f(g).backward(incoming))
            except RuntimeError as error:  # A backend that this device does not have.
                print(f"{where}: {str(error).splitlines()[0][:120]}", flush=True)
                continue
        not_finite = sum(int((~one.isfinite()).sum()) for one in got)
        # The first channel makes the logits low. Its gradient is a sum of numbers that cancel, times thousands.
        first = 1 if low else 0
        worst = max(
            apart(one[..., first:], other[..., first:]) if place != 0 else apart(one, other)
            for place, (one, other) in enumerate(zip(got, wanted, strict=True))
        )
        numbers = {"not_finite": not_finite, "forward_ms": forward, "both_ms": both}
        probe.report(where, **numbers, **({} if not_finite else {"error": worst}))


def _prefix(probe: Probe) -> None:
    size, heads, width = (2, 8, 32) if probe.tiny else (32, 8, 256)
    lengths = torch.randint(560, 580, (size,))
    rows = -(-int(lengths.sum()) // 256) * 256
    starts = torch.cat((torch.zeros(1), lengths.cumsum(0), torch.tensor([rows]))).int().to(probe.device)
    operations = 4 * float((lengths.double() ** 2).sum()) * heads * width
    for kv_heads in (1, heads):
        shape = {"device": probe.device, "dtype": torch.bfloat16, "requires_grad": True}
        q = torch.randn(rows, heads, width, **shape)
        kv = KeysValues(*(torch.randn(rows, kv_heads, width, **shape) for _ in "kv"))
        incoming = torch.randn(rows, heads * width, device=probe.device, dtype=torch.bfloat16)

        def forward(q: torch.Tensor = q, kv: KeysValues = kv) -> torch.Tensor:
            return attend_sequences(q, kv, starts, starts, 1024, 1024)

        one = probe.milliseconds(lambda forward=forward: forward().detach())
        both = probe.milliseconds(lambda forward=forward, incoming=incoming: forward().backward(incoming))
        probe.report(
            f"prefix with {kv_heads} key heads",
            forward_ms=one,
            both_ms=both,
            forward_tflops=operations / one / 1e9,
            backward_tflops=2.5 * operations / max(both - one, 1e-9) / 1e9,
        )


def _vision(probe: Probe) -> None:
    images, heads, patches, width = (4, 4, 64, 24) if probe.tiny else (64, 16, 256, 72)
    shape = (images, patches, 3, heads, width)
    qkv = torch.randn(shape, device=probe.device, dtype=torch.bfloat16).requires_grad_()
    incoming = torch.randn(images, patches, heads * width, device=probe.device, dtype=torch.bfloat16)

    def forward() -> torch.Tensor:
        q, k, v = qkv.transpose(1, 3).unbind(2)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    for name, backend in (BACKENDS | {"flash": SDPBackend.FLASH_ATTENTION}).items():
        with sdpa_kernel(backend) if backend is not None else contextlib.nullcontext():
            try:
                one = probe.milliseconds(lambda: forward().detach())
                both = probe.milliseconds(lambda: forward().backward(incoming))
            except RuntimeError as error:
                print(f"vision {name}: {str(error).splitlines()[0][:120]}", flush=True)
                continue
        probe.report(f"vision {name}", forward_ms=one, both_ms=both)


def products(probe: Probe, _: Any) -> None:
    """10¹² operations/s in bfloat16: forward, gradient of the input, of the weight; the latter also with bf16 sums."""
    rows, patches, suffix = (64, 64, 8) if probe.tiny else (18432, 16384, 320)
    shapes = {
        "vlm gate_up": (rows, 32768, 2048),
        "vlm down": (rows, 2048, 16384),
        "vlm qkv": (rows, 2560, 2048),
        "vlm o": (rows, 2048, 2048),
        "vision qkv": (patches, 3456, 1152),
        "vision fc1": (patches, 4304, 1152),
        "vision fc2": (patches, 1152, 4304),
        "expert gate_up": (suffix, 8192, 1024),
        "expert down": (suffix, 1024, 4096),
    }
    matmul = torch.backends.cuda.matmul
    for name, (m, n, k) in shapes.items():
        if probe.tiny:
            n, k = n // 32, k // 32
        made = {"device": probe.device, "dtype": torch.bfloat16}
        x, weight, gradient = (torch.randn(shape, **made) for shape in ((m, k), (n, k), (m, n)))
        calls = {
            "forward": lambda x=x, weight=weight: F.linear(x, weight),
            "input": lambda gradient=gradient, weight=weight: gradient @ weight,
            "weight": lambda gradient=gradient, x=x: gradient.T @ x,
        }
        before = matmul.allow_bf16_reduced_precision_reduction
        try:
            found = {}
            for sums in (False, True):
                matmul.allow_bf16_reduced_precision_reduction = sums
                for which in ("weight",) if sums else tuple(calls):
                    time = probe.milliseconds(calls[which])
                    found[which + "_bf16_sums" * sums] = 2 * m * n * k / time / 1e9
        finally:
            matmul.allow_bf16_reduced_precision_reduction = before
        probe.report(f"{name} {m} x {n} x {k}", **found)
