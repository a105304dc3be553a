"""A stand-in on the CPU for CUDA's kernel for packed sequences, `varlen_attn`, and policies that believe in it.

It computes each sequence in float64 and checks what the kernel asks of its arguments, read off torch 2.11's
FlashAttention 2. Registered under the operation's own name: autograd, `torch.compile` and the counting of operations
see what they see on a GPU.
"""

import contextlib
from itertools import pairwise
from unittest import mock

import torch
from torch.nn.attention import varlen

from rlinf_plugins_openpi.model import attention, pi0
from rlinf_plugins_text.model import attention as text_attention


def sequences(query, key, starts, key_starts, longest, longest_keys):
    """The rows of each sequence's queries and keys."""
    assert starts.dtype == key_starts.dtype == torch.int32
    assert starts.is_contiguous()
    assert key_starts.is_contiguous()
    assert len(starts) == len(key_starts)
    assert int(starts[-1]) == len(query)
    assert int(key_starts[-1]) == len(key)
    assert query.stride(-1) == key.stride(-1) == 1
    for (begin, end), (first, last) in zip(pairwise(starts.tolist()), pairwise(key_starts.tolist()), strict=True):
        assert 0 <= end - begin <= longest
        assert 0 <= last - first <= longest_keys
        yield slice(begin, end), slice(first, last)


def heads_first(rows, groups=1):
    """[rows, K, D] -> [groups · K, rows, D] in float64."""
    return rows.transpose(0, 1).double().repeat_interleave(groups, 0)


def _weights(q, k, scale, window):
    """Attention probabilities; a window [left, right] is aligned with the last query and the last key."""
    left, right = window or (-1, -1)
    places = torch.arange(k.shape[1]) - torch.arange(q.shape[1])[:, None] - (k.shape[1] - q.shape[1])
    hidden = torch.zeros_like(places, dtype=torch.bool)
    if left >= 0:
        hidden |= places < -left
    if right >= 0:
        hidden |= places > right
    return ((q @ k.mT) * scale).masked_fill(hidden, -torch.inf).softmax(-1)


@varlen._varlen_attn.register_kernel("cpu")
def forward(query, key, value, starts, key_starts, longest, longest_keys, causal=False, scale=None, window=None):
    out, groups = torch.empty_like(query), query.shape[1] // key.shape[1]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    for rows, seen in sequences(query, key, starts, key_starts, longest, longest_keys):
        q, k, v = heads_first(query[rows]), heads_first(key[seen], groups), heads_first(value[seen], groups)
        out[rows] = _weights(q, k, scale, window).matmul(v).transpose(0, 1).to(out.dtype)
    return out, query.new_zeros(query.shape[1], len(query), dtype=torch.float32), torch.zeros(2, dtype=torch.uint64)


@varlen._varlen_attn_backward.register_kernel("cpu")
def backward(
    grad, query, key, value, out, lse, starts, key_starts, longest, longest_keys, causal, rng, scale=None, window=None
):
    # Rows of no sequence would stay uninitialised, as on a GPU.
    grads = [torch.full_like(one, torch.nan, memory_format=torch.contiguous_format) for one in (query, key, value)]
    groups = query.shape[1] // key.shape[1]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    for rows, seen in sequences(query, key, starts, key_starts, longest, longest_keys):
        q, k, v = heads_first(query[rows]), heads_first(key[seen], groups), heads_first(value[seen], groups)
        weights, incoming = _weights(q, k, scale, window), heads_first(grad[rows])
        scores = incoming @ v.mT
        scores = weights * (scores - (scores * weights).sum(-1, keepdim=True)) * scale
        found = scores @ k, *(one.unflatten(0, (-1, groups)).sum(1) for one in (scores.mT @ q, weights.mT @ incoming))
        for into, one, place in zip(grads, found, (rows, seen, seen), strict=True):
            into[place] = one.transpose(0, 1).to(into.dtype)
    return tuple(grads)


@contextlib.contextmanager
def packed_attention():
    """Let policies attend as on CUDA, in any dtype."""

    def yes(_):
        return True

    with (
        mock.patch.object(attention, "attends_packed", yes),
        mock.patch.object(pi0, "attends_packed", yes),
        mock.patch.object(text_attention, "has_kernel", yes),
    ):
        yield
