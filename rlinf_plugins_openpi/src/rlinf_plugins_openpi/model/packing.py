"""Prefixes of different lengths laid end to end: absent cameras and padding are no rows, and cost nothing.

Torch and the standard library only. Axes: B samples, C cameras, P tokens of an image, I images that are there, M rows
of the pool (tokens of those I images, then all B·T text tokens), R rows of the packed prefix: sample after sample, in
each its images and its text, then filler up to a multiple. L places of the grid, which holds a sample in each row.

There is always at least one filler row, the last, and one padded place in the grid. No loss reaches either, so their
gradients are exactly zero: one row stands for all padding, and what was moved by an index is moved back by another.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

GRID_MULTIPLES = (16, 64)
"""Of the places in the grid: never fewer, for the sake of vectors, and no more, for the sake of padding."""
MULTIPLES = (16, 256)
"""Of the rows of a prefix, where nothing else is asked for: the least and the greatest."""
LONGEST_FILLER = 512
"""Rows of filler at most."""


class Packing(NamedTuple):
    """Which token goes where. All indices are int64."""

    images: torch.Tensor
    """[I]: the images that are there, of B·C; image 0 where there is none."""
    from_pool: torch.Tensor
    """[R]: the row of the pool that each row of the prefix is; that of filler is any."""
    to_pool: torch.Tensor
    """[M]: where each row of the pool went; filler where nowhere."""
    positions: torch.Tensor
    """[R]: each row's place within its sample, which counts valid tokens only."""
    starts: torch.Tensor
    """Int32 [B + 2]: where each sample begins, where filler begins, and R."""
    to_grid: torch.Tensor
    """[B, L]: the row at each place of the grid; filler where there is none."""
    from_grid: torch.Tensor
    """[R]: each row's place in the flattened grid; of filler, a padded one."""

    @property
    def valid(self) -> torch.Tensor:
        """Bool [B, L]: the places of the grid that hold a token."""
        return self.to_grid != len(self.from_grid) - 1

    @property
    def lengths(self) -> torch.Tensor:
        """[B]: tokens of each sample."""
        return self.starts[1:-1] - self.starts[:-2]


def multiple_for(tokens: int) -> int:
    """What to fill a prefix up to a multiple of: filler is a 64th of it or 16 tokens at most, and shapes are few."""
    least, most = MULTIPLES
    return min(max(1 << max((tokens // 64).bit_length() - 1, 0), least), most)


def pack(
    image_mask: torch.Tensor, token_mask: torch.Tensor, *, image_tokens: int, multiple: int | None = None
) -> dict[str, torch.Tensor]:
    """The packing of a batch, as a mapping that a loader can carry; on the CPU, so that no device is waited for.

    Args:
        image_mask: Bool [B, C]: which cameras a sample has.
        token_mask: Bool [B, T]: which text tokens count.
        image_tokens: Tokens of an image, P.
        multiple: R is a multiple of this, and L of the nearest to it in 16 to 64: few shapes for compiled code; None:
            `multiple_for` the tokens of all samples, and of the longest.

    Raises:
        ValueError: `multiple` is above 512.
    """
    if multiple is not None and multiple > LONGEST_FILLER:
        raise ValueError(f"the multiple may be {LONGEST_FILLER} at most, not {multiple}")
    batch, text = token_mask.shape
    images = image_mask.flatten().nonzero().flatten()
    images = images if len(images) else torch.zeros(1, dtype=torch.int64)
    # For every token of the padded prefix: whether it counts, and its row in the pool.
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
    """The packing that a batch brings, or (where it was not made by `collate`) that of its masks."""
    if "packing" in batch:
        return Packing(**batch["packing"])
    masks = (batch["image_mask"], batch["token_mask"])
    tensors = pack(*(mask.cpu() for mask in masks), image_tokens=image_tokens)
    return Packing(**{name: tensor.to(masks[0].device) for name, tensor in tensors.items()})


def rearrange(rows: torch.Tensor, index: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """`rows[index]` along the first axis, with a gradient that is moved by `inverse` instead of being added up.

    Exact where every row with a gradient is taken once: see the head of this file.
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
    """`size` times `value`, but for `values` at `where`."""
    out = torch.full((size,), value)
    out[where] = values
    return out
