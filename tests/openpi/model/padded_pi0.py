"""π0 and π0.5 as one would write them down first: every camera and all padding computed, and masked in attention.

It shares nothing with the model but the small parts outside its layers, and takes its weights by their published
parts. What the model leaves out, packs and rearranges is held to it.
"""

import math

import torch
import torch.nn.functional as F

from rlinf_plugins_openpi.model.parts import unpacked
from rlinf_plugins_openpi.model.pi0 import time_features


def padded_losses(model, batch):
    """The loss of every action, [B, H]."""
    size, w = model.dimensions, unpacked(dict(model.named_parameters()), model.dimensions)
    t = batch["time"][:, None, None]
    x_t = t * batch["noise"] + (1 - t) * batch["actions"]
    prefix, prefix_valid = _prefix(w, size, batch)
    suffix, cond = _suffix(w, size, batch, x_t)
    valid = torch.cat((prefix_valid, prefix_valid.new_ones(suffix.shape[:2])), 1)
    positions = valid.cumsum(1) - 1
    count = prefix.shape[1]
    visible = valid[:, None].repeat(1, valid.shape[1], 1)
    visible[:, :count, count:] = False
    if not size.pi05:
        visible[:, count, count + 1 :] = False
    streams = [prefix, suffix]
    for i in range(size.vlm.depth):
        streams = _layer(w, size, f"layers.{i}.", streams, cond, positions, visible)
    out, _ = _norm(w, "expert_norm", streams[1], cond)
    velocity = F.linear(out[:, -size.action_horizon :], w["action_out_proj.weight"], w["action_out_proj.bias"])
    return (velocity - (batch["noise"] - batch["actions"])).square().mean(-1)


def _linear(w, name, x):
    return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def _prefix(w, size, batch):
    images, mask = batch["images"], batch["image_mask"]
    vision, dtype = size.vision, w["embedding.weight"].dtype
    pixels = (images.flatten(0, 1).to(dtype) / 255 * 2 - 1).permute(0, 3, 1, 2)
    patches = "vision.patch_embedding."
    x = F.conv2d(pixels, w[f"{patches}weight"], w[f"{patches}bias"], stride=vision.patch_size)
    x = x.flatten(2).transpose(1, 2) + w[f"{patches}position"]
    for i in range(vision.depth):
        block = f"vision.blocks.{i}."
        normed = _layer_norm(w, f"{block}layer_norm1", x)
        q, k, v = (
            _linear(w, block + name, normed).unflatten(-1, (vision.num_heads, -1)).transpose(1, 2)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        scores = (q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])).softmax(-1)
        x = x + _linear(w, f"{block}out_proj", (scores @ v).transpose(1, 2).flatten(2))
        hidden = _linear(w, f"{block}fc1", _layer_norm(w, f"{block}layer_norm2", x))
        x = x + _linear(w, f"{block}fc2", F.gelu(hidden, approximate="tanh"))
    seen = _linear(w, "vision.head.projector", _layer_norm(w, "vision.head.norm", x))
    text = w["embedding.weight"][batch["tokens"]] * math.sqrt(size.vlm.width)
    tokens = torch.cat((seen.unflatten(0, mask.shape).flatten(1, 2), text), 1)
    return tokens, torch.cat((mask.repeat_interleave(vision.num_tokens, 1), batch["token_mask"]), 1)


def _layer_norm(w, name, x):
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps=1e-6)


def _suffix(w, size, batch, x_t):
    actions = _linear(w, "action_in_proj", x_t)
    features = time_features(batch["time"], size.expert.width).to(actions.dtype)
    if size.pi05:
        return actions, F.silu(_linear(w, "time_mlp_out", F.silu(_linear(w, "time_mlp_in", features))))
    mixed = torch.cat((actions, features[:, None].expand_as(actions)), -1)
    mixed = _linear(w, "action_time_mlp_out", F.silu(_linear(w, "action_time_mlp_in", mixed)))
    return torch.cat((_linear(w, "state_proj", batch["state"])[:, None], mixed), 1), None


def _norm(w, name, x, cond):
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
    if f"{name}.dense.weight" not in w:
        return normed * (1 + w[f"{name}.weight"]), 1.0
    scale, shift, gate = _linear(w, f"{name}.dense", cond)[:, None].chunk(3, -1)
    return normed * (1 + scale) + shift, gate


def _layer(w, size, layer, streams, cond, positions, visible):
    """Both experts' tokens in one sequence, every query against every key."""
    parts, gates, projected = [f"{layer}vlm.", f"{layer}expert."], [], []
    for part, x in zip(parts, streams, strict=True):
        normed, gate = _norm(w, f"{part}input_norm", x, cond)
        gates.append(gate)
        projected.append([_linear(w, f"{part}{name}", normed) for name in ("q_proj", "k_proj", "v_proj")])
    q, k, v = (torch.cat(both, 1).unflatten(-1, (-1, size.vlm.head_dim)) for both in zip(*projected, strict=True))
    q, k = _rotate(q, positions), _rotate(k, positions)
    k, v = (x.repeat_interleave(size.vlm.num_heads // size.vlm.num_kv_heads, 2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(size.vlm.head_dim)
    scores = scores.masked_fill(~visible[:, None], -2.3819763e38).softmax(-1)
    attended = torch.einsum("bhqk,bkhd->bqhd", scores, v).flatten(2)
    out = []
    for part, x, gate, own in zip(parts, streams, gates, attended.split([s.shape[1] for s in streams], 1), strict=True):
        x = x + _linear(w, f"{part}o_proj", own) * gate
        normed, gate = _norm(w, f"{part}post_attention_norm", x, cond)
        gated = F.gelu(_linear(w, f"{part}gate_proj", normed), approximate="tanh")
        out.append(x + _linear(w, f"{part}down_proj", gated * _linear(w, f"{part}up_proj", normed)) * gate)
    return out


def _rotate(x, positions):
    half = x.shape[-1] // 2
    exponents = torch.arange(half, dtype=torch.float32) * (1.0 / half)
    angles = positions[..., None, None].to(torch.float32) / 10_000.0**exponents
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()), -1)
