"""π0 and π0.5: a vision-language model and an action expert that turn noise into action chunks by flow matching.

Torch and the standard library only: this is single-device code that runs on a bare CUDA machine; sharding, precision
and compilation are applied from outside. Axes: B batch, C camera, L text tokens, R rows of the packed prefix (of each
sample the images it has, then its text; see `packing`), G slots per sample of the grid, T suffix tokens, H action
horizon, A action width, W VLM width, E expert width.

The two differ as follows: π0 has a state token before the actions (in an attention block of its own) and mixes time
into the action tokens; π0.5 ignores the continuous state, and time modulates the expert's norms.

The reference is openpi's JAX implementation. Noise is at t = 1 and data at t = 0, as there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from rlinf_core.contract.module import PolicyOutput, PreviousActions, ShardUnit
from rlinf_plugins_openpi.model.attention import (
    KeysValues,
    PrefixContext,
    Rotation,
    SuffixContext,
    SuffixSequences,
    attends_packed,
    bias,
    longest_sequence,
    prefix_attention,
    rotation,
    spread_bias,
)
from rlinf_plugins_openpi.model.augment import Augmentation, augment, normalise, resize_with_pad
from rlinf_plugins_openpi.model.gemma import (
    AdaptiveRMSNorm,
    EmbeddingRows,
    JointLayer,
    Modulation,
    PrefixEnd,
    RMSNorm,
    TokenEmbedding,
)
from rlinf_plugins_openpi.model.initialization import initial_value
from rlinf_plugins_openpi.model.packing import LONGEST_FILLER, Packing, pack_suffix, packing_of, rearrange
from rlinf_plugins_openpi.model.real_time import continue_chunks, in_prefix
from rlinf_plugins_openpi.model.sampling import CompiledStep, Moment, Shared, Step, filled_up, on_grid
from rlinf_plugins_openpi.model.siglip import SigLIP

if TYPE_CHECKING:
    from rlinf_plugins_openpi.model.dimensions import Pi0Dimensions


MIN_PERIOD, MAX_PERIOD = 4e-3, 4.0
"""Shortest and longest period of the time features; t is in [0, 1]."""


class Prefix(NamedTuple):
    """The packed observations: for every sample the image tokens of its cameras, then text."""

    tokens: torch.Tensor
    """[R, W] in the compute dtype."""
    packing: Packing
    """The assignment of rows to samples and images."""


class Suffix(NamedTuple):
    """The input of the action expert at one flow time."""

    tokens: torch.Tensor
    """[B, T, E] float32: π0's state token, then the noisy actions."""
    cond: torch.Tensor | None
    """[B, E], or [B, T, E] with a time for each action, float32: the condition of π0.5's adaptive norms. π0: None."""


class Pi0(nn.Module):
    """π0 or π0.5, depending on `dimensions.pi05`.

    Parameters are uninitialised memory until `initial_value` or weights fill them.

    Args:
        dimensions: All sizes.
        num_sampling_steps: Default number of Euler steps of `sample_actions`.
        mask_padded_steps: Leave actions past the end of an episode out of the loss. The reference does not.
        mask_padded_dims: Leave action dims that the robot does not have out of the loss. The reference does not.
        embedding_rows: Token ids, ascending, whose embedding rows become a parameter of their own; then the model can
            read only these tokens, and never reads the whole embedding. Empty: it reads the whole embedding.
        augmentations: Label -> image augmentation of training, applied in order.
    """

    def __init__(
        self,
        dimensions: Pi0Dimensions,
        *,
        num_sampling_steps: int = 10,
        mask_padded_steps: bool = False,
        mask_padded_dims: bool = False,
        embedding_rows: Sequence[int] = (),
        augmentations: Mapping[str, Augmentation] = MappingProxyType({}),
    ) -> None:
        super().__init__()
        vlm, expert, action_dim = dimensions.vlm, dimensions.expert, dimensions.action_dim
        self.dimensions = dimensions
        self.num_sampling_steps = num_sampling_steps
        self.augmentations = dict(augmentations)
        self.compiled: CompiledStep | None = None
        """The denoising step, if `compile_sampling` was called."""
        self.mask_padded_steps, self.mask_padded_dims = mask_padded_steps, mask_padded_dims
        self.vision = SigLIP(dimensions.vision, vlm.width)
        self.embedding = TokenEmbedding(dimensions.vocab_size, vlm.width)
        self.embedding_rows = (
            EmbeddingRows(embedding_rows, dimensions.vocab_size, vlm.width) if embedding_rows else None
        )
        self.layers = nn.ModuleList(
            JointLayer(vlm, expert, adaptive=dimensions.pi05, last=depth + 1 == vlm.depth) for depth in range(vlm.depth)
        )
        self.prefix_end = PrefixEnd(vlm)
        self.expert_norm = AdaptiveRMSNorm() if dimensions.pi05 else RMSNorm(expert.width)
        self.action_in_proj = nn.Linear(action_dim, expert.width)
        self.action_out_proj = nn.Linear(expert.width, action_dim)
        if dimensions.pi05:
            self.modulation = Modulation(expert.width, expert.depth)
            self.time_mlp_in = nn.Linear(expert.width, expert.width)
            self.time_mlp_out = nn.Linear(expert.width, expert.width)
        else:
            self.state_proj = nn.Linear(action_dim, expert.width)
            self.action_time_mlp_in = nn.Linear(2 * expert.width, expert.width)
            self.action_time_mlp_out = nn.Linear(expert.width, expert.width)

    def forward(self, batch: Mapping[str, Any]) -> PolicyOutput:
        """The flow-matching loss of a batch.

        Args:
            batch: `images` uint8 [B, C, height, width, 3], resized if they are not the image tower's 224 x 224;
                `image_mask` bool [B, C], `tokens` int [B, L], `token_mask` bool [B, L]; float32 `state` [B, A],
                `actions` [B, H, A], `noise` [B, H, A], `time` [B]. Preferably also `packing`, see `packing.pack`:
                without it the masks are read on the host. In training mode, images are augmented if the batch has
                `augmentation`, the random numbers of all augmentations: the C cameras in order -> `<label>.<name>` ->
                [B, ...], see `augment`. With `rtc_delay` int64 [B], the first so many actions of each chunk are given:
                without noise, at flow time 0, and left out of the loss.

        Returns:
            Sum over samples and horizon of the squared error averaged over action dims, and the number of terms in the
            sum. As in the reference these are B·H terms over all dims, unless padding is masked or actions are given.
        """
        loss_BH = self.losses(batch)
        counted_BH = torch.ones_like(loss_BH)
        if self.mask_padded_steps:
            counted_BH = (~batch["actions_is_pad"]).float()
        if "rtc_delay" in batch:
            counted_BH = counted_BH * ~in_prefix(batch["rtc_delay"], loss_BH.shape[1])
        if self.mask_padded_steps or "rtc_delay" in batch:
            loss_BH = loss_BH * counted_BH
        sample_losses = torch.stack((loss_BH.detach().sum(1), counted_BH.sum(1)), dim=1)
        return PolicyOutput(loss_BH.sum(), counted_BH.sum(), {}, sample_losses)

    def losses(self, batch: Mapping[str, Any]) -> torch.Tensor:
        """The loss of every action of every chunk, [B, H]."""
        noise, actions, time = batch["noise"], batch["actions"], batch["time"]
        t = time[:, None, None]
        if "rtc_delay" in batch:
            time = time[:, None] * ~in_prefix(batch["rtc_delay"], actions.shape[1])
            t = time[..., None]
        prefix = self.embed_prefix(batch, augmented=self.training)
        suffix = self.embed_suffix(batch["state"], t * noise + (1.0 - t) * actions, time)
        suffix_out = self.run(prefix, suffix)
        error_BHA = F.mse_loss(self.velocity(suffix_out), noise - actions, reduction="none")
        if not self.mask_padded_dims:
            return error_BHA.mean(-1)
        width_B = batch["action_width"]
        own_BA = torch.arange(error_BHA.shape[-1], device=width_B.device) < width_B[:, None]
        own_BH: torch.Tensor = (error_BHA * own_BA[:, None]).sum(-1) / width_B[:, None]
        return own_BH

    @torch.no_grad()
    def sample_actions(
        self, batch: Mapping[str, Any], noise: torch.Tensor, num_steps: int | None = None
    ) -> torch.Tensor:
        """Draw action chunks by Euler integration from t = 1 to 0; the prefix runs once.

        Args:
            batch: Observations as in `forward`; actions, noise and time in it are ignored.
            noise: [B, H, A] float32, standard normal.
            num_steps: Euler steps; None: `num_sampling_steps`.

        Returns:
            [B, H, A] float32, normalised actions.
        """
        steps = self.num_sampling_steps if num_steps is None else num_steps
        prefix = self.embed_prefix(batch)
        step: Step = self.euler_step
        slots = None if self.compiled is None else self.compiled.slots_for(prefix.packing)
        shared, x_t = self.share(prefix, batch["state"], noise, slots), noise
        if self.compiled is not None:
            step = self.compiled
            x_t, shared = filled_up(x_t, shared)
        # Filled on the device: numbers of a list would be copied to it, for which the host waits.
        size = noise.new_full((), -1.0 / steps)
        for moment in self.moments(torch.stack([noise.new_full((), time) for time in euler_times(steps)])):
            x_t = step(x_t, moment, shared, size)
        return x_t[: len(noise)]

    def continue_actions(
        self, batch: Mapping[str, Any], noise: torch.Tensor, previous: PreviousActions, num_steps: int | None = None
    ) -> torch.Tensor:
        """Draw action chunks that continue others, see `real_time`; the rest is as in `sample_actions`.

        Args:
            batch: Observations.
            noise: [B, H, A] float32, standard normal.
            previous: The actions to continue.
            num_steps: Euler steps; None: `num_sampling_steps`.

        Returns:
            [B, H, A] float32, normalised actions.
        """
        steps = self.num_sampling_steps if num_steps is None else num_steps
        with torch.no_grad():
            prefix = self.embed_prefix(batch)
            cache = self.prefill(prefix)

        def velocity(x_t: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
            suffix = self.embed_suffix(batch["state"], x_t, time)
            return self.velocity(self.run(prefix, suffix, cache=cache))

        return continue_chunks(velocity, noise, previous, euler_times(steps))

    def embed_prefix(self, batch: Mapping[str, Any], *, augmented: bool = False) -> Prefix:
        """Embed all images present in one call (augmented if `augmented`), and text."""
        images, vision = batch["images"], self.dimensions.vision
        packing = packing_of(batch, vision.num_tokens)
        if images.shape[2:4] != (vision.image_size, vision.image_size):
            images = resize_with_pad(normalise(images), vision.image_size, vision.image_size)
        if augmented and "augmentation" in batch:
            images = augment(images, batch["augmentation"], self.augmentations)
        images = images.flatten(0, 1)
        if len(packing.images) < len(images):
            images = images[packing.images]
        text = (self.embedding_rows or self.embedding)(batch["tokens"])
        pool = torch.cat((self.vision(images).flatten(0, 1), text.flatten(0, 1)))
        return Prefix(rearrange(pool, packing.from_pool, packing.to_pool), packing)

    def embed_suffix(self, state: torch.Tensor, x_t: torch.Tensor, time: torch.Tensor) -> Suffix:
        """Embed noisy actions [B, H, A] at flow time [B] or [B, H] (and π0's state [B, A]) for the action expert."""
        actions = _linear(self.action_in_proj, x_t)
        features = time_features(time, actions.shape[-1])
        if self.dimensions.pi05:
            return Suffix(actions, self._condition(features))
        state_token = _linear(self.state_proj, state)[:, None]
        return Suffix(torch.cat((state_token, self._mix(actions, features)), dim=1), None)

    def _condition(self, features: torch.Tensor) -> torch.Tensor:
        """The condition [..., E] of π0.5's adaptive norms from time features [..., E]."""
        return F.silu(self.time_mlp_out(F.silu(_linear(self.time_mlp_in, features))))

    def _mix(self, actions: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """Mix time features, [B or 1, E], or [B, H, E] if actions differ in time, into action tokens [B, H, E]."""
        features = features.to(actions.dtype).view(len(features), -1, actions.shape[-1]).expand_as(actions)
        hidden = F.silu(self.action_time_mlp_in(torch.cat((actions, features), dim=-1)))
        mixed: torch.Tensor = self.action_time_mlp_out(hidden)
        return mixed

    def prefill(self, prefix: Prefix) -> list[KeysValues]:
        """Compute the prefix's keys and values of every layer."""
        context, cache = self.prefix_context(prefix), []
        tokens: torch.Tensor | None = prefix.tokens
        for layer in self.layers:
            tokens, _, kv = layer((tokens, context), None)
            cache.append(kv)
        return cache

    def run(self, prefix: Prefix, suffix: Suffix, *, cache: list[KeysValues] | None = None) -> torch.Tensor:
        """Run both experts over all layers.

        Args:
            prefix: The packed observations; with a cache, only their packing is used.
            suffix: The tokens of the action expert.
            cache: The result of `prefill` for this prefix.

        Returns:
            Suffix outputs [B, T, E], after their final norm.
        """
        context = self.prefix_context(prefix) if cache is None else None
        suffix_context = self.suffix_context(prefix, suffix.tokens.shape[1])
        modulations, last = ([None] * len(self.layers), None) if suffix.cond is None else self.modulation(suffix.cond)
        tokens: torch.Tensor | None = prefix.tokens
        # In the layers' dtype from the first on, so that compiled code sees one.
        suffix_tokens = suffix.tokens.to(prefix.tokens.dtype)
        for index, (layer, modulation) in enumerate(zip(self.layers, modulations, strict=True)):
            source = cache[index] if cache is not None else (tokens, context)
            tokens, suffix_tokens, _ = layer(source, (suffix_tokens, suffix_context), modulation)
        out: torch.Tensor = self.expert_norm(suffix_tokens, last)[0]
        return out

    def read(self, prefix: Prefix) -> torch.Tensor:
        """The VLM's output for the prefix, [R, W] after its final norm. No action depends on it."""
        context, tokens = self.prefix_context(prefix), prefix.tokens
        for layer in self.layers[:-1]:
            tokens, _, _ = layer((tokens, context), None)
        out: torch.Tensor = self.prefix_end(tokens, self.layers[-1].vlm, context)
        return out

    def share(self, prefix: Prefix, state: torch.Tensor, noise: torch.Tensor, slots: int | None = None) -> Shared:
        """Compute what all steps of `sample_actions` share: nothing here depends on the noisy actions or on time.

        Args:
            prefix: The packed observations.
            state: [B, A], π0's state.
            noise: [B, H, A].
            slots: Slots of the grid for every prefix, for a compiled step; None: those of this batch, or packed rows.
        """
        cache, dtype, packing = self.prefill(prefix), prefix.tokens.dtype, prefix.packing
        token = None if self.dimensions.pi05 else _linear(self.state_proj, state)[:, None]
        count = noise.shape[1] + (token is not None)
        if slots is None:
            context = self.suffix_context(prefix, count)
        else:
            cache = [on_grid(kv, packing, slots) for kv in cache]
            valid = F.pad(packing.valid, (0, slots - packing.valid.shape[1]))
            visible = self.suffix_visible(valid, count)
            context = SuffixContext(self.suffix_rotation(packing, count), bias(visible[:, None], dtype))
        if isinstance(context.attention, torch.Tensor):
            groups = self.dimensions.expert.num_heads // self.dimensions.expert.num_kv_heads
            context = context._replace(attention=spread_bias(context.attention, groups))
        return Shared(tuple(cache), context, token, dtype)

    def moments(self, times: torch.Tensor) -> Iterator[Moment]:
        """What the action expert reads of each of these times, [S] float32; all are computed by the same products."""
        features = time_features(times, self.dimensions.expert.width)
        if not self.dimensions.pi05:
            yield from (Moment(one, None, None) for one in torch.split(features, 1))
            return
        layers, last = self.modulation(self._condition(features))
        for number in range(len(times)):
            here = slice(number, number + 1)
            yield Moment(None, tuple(layer[here] for layer in layers), last[here])

    def euler_step(self, x_t: torch.Tensor, moment: Moment, shared: Shared, size: torch.Tensor) -> torch.Tensor:
        """The next noisy actions [B, H, A], a step of this size (a scalar) along the velocity."""
        return x_t + size * self.velocity_at(x_t, moment, shared)

    def compile_sampling(self, *, on: bool = True, backend: str | Callable[..., Any] = "inductor") -> None:
        """Compile the denoising step when it is first used; or compute it as written again."""
        self.compiled = CompiledStep(self.euler_step, backend=backend) if on else None

    def velocity_at(self, x_t: torch.Tensor, moment: Moment, shared: Shared) -> torch.Tensor:
        """The velocity [B, H, A] of noisy actions [B, H, A], float32, from what `share` and `moments` return."""
        tokens = _linear(self.action_in_proj, x_t)
        if shared.state is not None and moment.features is not None:
            tokens = torch.cat((shared.state, self._mix(tokens, moment.features)), dim=1)
        tokens = tokens.to(shared.dtype)
        modulations = moment.modulations or (None,) * len(self.layers)
        for layer, kv, modulation in zip(self.layers, shared.cache, modulations, strict=True):
            _, tokens, _ = layer(kv, (tokens, shared.context), modulation)
        return self.velocity(self.expert_norm(tokens, moment.last)[0])

    def velocity(self, suffix_out: torch.Tensor) -> torch.Tensor:
        """Suffix outputs [B, T, E] -> predicted velocity [B, H, A], float32."""
        return _linear(self.action_out_proj, suffix_out[:, -self.dimensions.action_horizon :])

    def prefix_context(self, prefix: Prefix) -> PrefixContext:
        """Positions count only valid tokens, so that leaving out invalid ones changes nothing."""
        packing = prefix.packing
        by = rotation(packing.positions, self.dimensions.vlm.head_dim)
        return PrefixContext(by, prefix_attention(packing, prefix.tokens))

    def suffix_context(self, prefix: Prefix, num_tokens: int) -> SuffixContext:
        """Suffix positions continue after the valid prefix; see `suffix_visible` for the attention mask."""
        packing = prefix.packing
        by = self.suffix_rotation(packing, num_tokens)
        if not attends_packed(prefix.tokens):
            visible = self.suffix_visible(packing.valid, num_tokens)
            return SuffixContext(by, bias(visible[:, None], prefix.tokens.dtype))
        alone = not self.dimensions.pi05  # π0's state token does not see the actions.
        filler = LONGEST_FILLER * (1 + alone)
        longest = longest_sequence(packing, filler, num_tokens)
        sequences = pack_suffix(packing, num_tokens, first_alone=alone)
        return SuffixContext(by, SuffixSequences(sequences, num_tokens, longest))

    def suffix_rotation(self, packing: Packing, num_tokens: int) -> Rotation:
        """The rotation of the suffix's positions, which continue after each sample's valid prefix."""
        positions = packing.lengths[:, None] + torch.arange(num_tokens, device=packing.lengths.device)
        return rotation(positions, self.dimensions.expert.head_dim)

    def suffix_visible(self, prefix_valid: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """Which keys the suffix's queries see, bool [B, T or 1, G+T]; one row if all queries see the same.

        All suffix tokens see the valid prefix. π0.5's see one another; π0's state token does not see the actions.
        """
        batch = prefix_valid.shape[0]
        if self.dimensions.pi05:
            return torch.cat((prefix_valid, prefix_valid.new_ones(batch, num_tokens)), dim=1)[:, None]
        own = prefix_valid.new_ones(num_tokens, num_tokens)
        own[0, 1:] = False
        rows = prefix_valid[:, None].expand(-1, num_tokens, -1)
        return torch.cat((rows, own.expand(batch, -1, -1)), dim=2)

    def shard_units(self) -> Iterator[ShardUnit]:
        """Modules to shard as units, roughly in order of use; the small projections are left to the root."""
        yield ShardUnit(self.vision.patch_embedding, "fp32")
        yield from (ShardUnit(block, block=True) for block in self.vision.blocks)
        yield ShardUnit(self.vision.head)
        yield ShardUnit(self.embedding, reached=self.embedding_rows is None, read_in_backward=False)
        if self.embedding_rows is not None:
            yield ShardUnit(self.embedding_rows, read_in_backward=False)
        yield ShardUnit(self.modulation if self.dimensions.pi05 else self.expert_norm)
        yield from (ShardUnit(layer, block=True) for layer in self.layers)
        yield ShardUnit(self.prefix_end, reached=False)

    def initial_value(self, name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
        """The initial value of the parameter `name`, float32 on the CPU; see `initialization`."""
        if self.embedding_rows is not None and name == "embedding_rows.weight":
            whole = (self.dimensions.vocab_size, *shape[1:])
            return initial_value("embedding.weight", whole, generator)[list(self.embedding_rows.rows)]
        return initial_value(name, shape, generator)

    def rebuild_buffers(self) -> None:
        """Rebuild the lookup of embedding rows; rotary frequencies and time periods are computed when used."""
        if self.embedding_rows is not None:
            self.embedding_rows.rebuild_buffers()


def _linear(linear: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """A small projection in its own dtype, which is float32 by contract, whatever the dtype of the blocks."""
    projected: torch.Tensor = linear(x.to(linear.weight.dtype))
    return projected


def time_features(time: torch.Tensor, width: int) -> torch.Tensor:
    """Sines, then cosines, of float32 time [...] at width/2 geometric periods from 0.004 to 4: [..., width].

    Angles reach 1570 rad, where the spacing of float32 is 1e-4, so the reference's order of operations matters. XLA
    turns its division by count - 1 into a product: with a product the features agree to 6e-8, with a division only to
    6e-5.
    """
    count = width // 2
    fraction = torch.arange(count, dtype=torch.float32, device=time.device) * (1.0 / (count - 1))
    fraction[-1] = 1.0
    period = MIN_PERIOD * (MAX_PERIOD / MIN_PERIOD) ** fraction
    angles = time[..., None] * ((1.0 / period) * 2.0 * math.pi)
    return torch.cat((angles.sin(), angles.cos()), dim=-1)


def euler_times(num_steps: int) -> list[float]:
    """Flow times at which n Euler steps evaluate the velocity, accumulated in float32 from 1 down to 1/n."""
    time, times = torch.ones((), dtype=torch.float32, device="cpu"), []
    step = -1.0 / num_steps
    while time >= -step / 2:
        times.append(time.item())
        time = time + step
    return times
