"""Pack prefixes of different lengths end to end, so that missing cameras and padding cost nothing.

Torch and the standard library only. Axes: B samples, C cameras, P tokens per image, I images present, M rows of the
pool (tokens of the I images, then all B·T text tokens), R rows of the packed prefix (sample after sample, each its
images and then its text; then filler up to a multiple), L slots per sample of the grid, which has one row per sample.

There is always at least one filler row, the last, and one padded slot in the grid. No loss reaches either, so their
gradients are exactly zero. Therefore one row can represent all padding, and the gradient of a gather is another gather.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

GRID_MULTIPLES = (16, 64)
"""Least and greatest multiple for the slots of the grid: 16 for vectorised kernels, 64 to limit padding."""
MULTIPLES = (16, 256)
"""Least and greatest default multiple for the rows of a prefix."""
LONGEST_FILLER = 512
"""Maximum number of filler rows."""


class Packing(NamedTuple):
    """Index tensors of a packed batch, int64 unless noted."""

    images: torch.Tensor
    """[I]: indices of the images present, among B·C; [0] if there are none."""
    from_pool: torch.Tensor
    """[R]: the row of the pool for each row of the prefix; arbitrary for filler."""
    to_pool: torch.Tensor
    """[M]: the row of the prefix for each row of the pool; the filler row if it is not used."""
    positions: torch.Tensor
    """[R]: the position of each row within its sample, counting valid tokens only."""
    starts: torch.Tensor
    """Int32 [B + 2]: the first row of each sample, the first row of filler, and R."""
    to_grid: torch.Tensor
    """[B, L]: the row of the prefix for each slot of the grid; the filler row for padding."""
    from_grid: torch.Tensor
    """[R]: the slot of each row in the flattened grid; a padded slot for filler."""

    @property
    def valid(self) -> torch.Tensor:
        """Bool [B, L]: the slots of the grid that contain a token."""
        return self.to_grid != len(self.from_grid) - 1

    @property
    def lengths(self) -> torch.Tensor:
        """[B]: number of tokens per sample."""
        return self.starts[1:-1] - self.starts[:-2]


def multiple_for(tokens: int) -> int:
    """The default multiple for this many tokens: few shapes, and filler of at most 1/64 of them, or 16."""
    least, most = MULTIPLES
    return min(max(1 << max((tokens // 64).bit_length() - 1, 0), least), most)


def pack(
    image_mask: torch.Tensor, token_mask: torch.Tensor, *, image_tokens: int, multiple: int | None = None
) -> dict[str, torch.Tensor]:
    """Compute the packing of a batch, as a mapping for the loader; on the CPU, so that no device is synchronised.

    Args:
        image_mask: Bool [B, C]: which cameras a sample has.
        token_mask: Bool [B, T]: which text tokens are valid.
        image_tokens: Tokens per image, P.
        multiple: R is a multiple of this, and L of this clamped to [16, 64], so that compiled code sees few shapes.
            None: `multiple_for` the tokens of all samples and of the longest sample.

    Raises:
        ValueError: `multiple` is above 512.
    """
    if multiple is not None and multiple > LONGEST_FILLER:
        raise ValueError(f"the multiple may be {LONGEST_FILLER} at most, not {multiple}")
    batch, text = token_mask.shape
    images = image_mask.flatten().nonzero().flatten()
    images = images if len(images) else torch.zeros(1, dtype=torch.int64)
    # For every token of the padded prefix: whether it is valid, and its row in the pool.
    valid = torch.cat((image_mask.repeat_interleave(image_tokens, dim=1), token_mask), dim=1)
    image = (image_mask.flatten().cumsum(0) - 1).view(batch, -1, 1)
    of_images = (image * image_tokens + torch.arange(image_tokens)).flatten(1)
    of_text = len(images) * image_tokens + torch.arange(batch * text).view(batch, text)
    pooled = torch.cat((of_images, of_text), dim=1)[valid]
    within = (valid.cumsum(1) - 1)[valid]
    sample = torch.arange(batch)[:, None].expand_as(valid)[valid]

    lengths, total = valid.sum(1), len(pooled)
    longest = int(lengths.max())
    rows = _up(total + 1, multiple or multiple_for(total))
    grid = _up(longest + 1, min(max(multiple or multiple_for(longest), GRID_MULTIPLES[0]), GRID_MULTIPLES[1]))
    place, counted = sample * grid + within, torch.arange(total)
    packing = Packing(
        images=images,
        from_pool=_filled(rows, 0, slice(total), pooled),
        to_pool=_filled(len(images) * image_tokens + batch * text, rows - 1, pooled, counted),
        positions=_filled(rows, 0, slice(total), within),
        starts=torch.cat((torch.zeros(1), lengths.cumsum(0), torch.tensor([rows]))).to(torch.int32),
        to_grid=_filled(batch * grid, rows - 1, place, counted).view(batch, grid),
        from_grid=_filled(rows, grid - 1, slice(total), place),
    )
    return packing._asdict()


def packing_of(batch: Mapping[str, Any], image_tokens: int) -> Packing:
    """The packing of a batch; computed from its masks if `collate` did not add one."""
    if "packing" in batch:
        return Packing(**batch["packing"])
    masks = (batch["image_mask"], batch["token_mask"])
    tensors = pack(*(mask.cpu() for mask in masks), image_tokens=image_tokens)
    return Packing(**{name: tensor.to(masks[0].device) for name, tensor in tensors.items()})


def rearrange(rows: torch.Tensor, index: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """`rows[index]` along the first axis; the gradient is gathered by `inverse` instead of scattered and summed.

    Exact if every row with a gradient is taken once: see the module docstring.
    """
    taken: torch.Tensor = _Rearrange.apply(rows, index.flatten(), inverse.flatten())  # type: ignore[no-untyped-call]
    return taken.view(*index.shape, *rows.shape[1:])


class _Rearrange(torch.autograd.Function):
    @staticmethod
    def forward(rows: torch.Tensor, index: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
        return rows.index_select(0, index)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return gradient.index_select(0, inverse), None, None


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _filled(size: int, value: int, where: slice | torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """A tensor of `size` times `value`, with `values` at `where`."""
    out = torch.full((size,), value)
    out[where] = values
    return out
