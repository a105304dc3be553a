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


def rearrange(
    rows: torch.Tensor, index: torch.Tensor, inverse: torch.Tensor, again: torch.Tensor | None = None
) -> torch.Tensor:
    """`rows[index]` along the first axis; the gradient is gathered by `inverse` instead of scattered and summed.

    Exact if every row with a gradient is taken once (see the module docstring), or twice: then `again` has its second
    place, and for a row that is taken once the place of filler, whose gradient is zero.
    """
    if again is not None:
        again = again.flatten()
    taken: torch.Tensor = _Rearrange.apply(rows, index.flatten(), inverse.flatten(), again)  # type: ignore[no-untyped-call]
    # Not a view where none is needed: compiled code would treat it as another kind of input.
    return taken if index.ndim == 1 else taken.view(*index.shape, *rows.shape[1:])


class _Rearrange(torch.autograd.Function):
    @staticmethod
    def forward(
        rows: torch.Tensor, index: torch.Tensor, inverse: torch.Tensor, again: torch.Tensor | None
    ) -> torch.Tensor:
        return rows.index_select(0, index)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.save_for_backward(*(one for one in inputs[2:] if one is not None))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        inverse, *again = ctx.saved_tensors
        own = gradient.index_select(0, inverse)
        return (own + gradient.index_select(0, again[0]) if again else own), None, None, None


class SuffixPacking(NamedTuple):
    """Where the keys of packed suffix queries are, so that no query needs a mask: int64 unless noted.

    The keys of a sequence are the rows of a sample's prefix, then suffix rows of the sample. The pool has R prefix rows
    and then B·T suffix rows; M key rows are taken from it. The last sequence is filler, without a query.
    """

    rows: torch.Tensor
    """[M]: the row of the pool for each key row."""
    inverse: torch.Tensor
    """[R + B·T]: the key row of each row of the pool."""
    again: torch.Tensor | None
    """[R + B·T]: a second key row; the last row of filler for rows that are taken once. None: all are taken once."""
    starts: torch.Tensor
    """Int32 [sequences + 1]: the first query of each sequence, and B·T."""
    key_starts: torch.Tensor
    """Int32 [sequences + 1]: the first key row of each sequence, and M."""


def pack_suffix(packing: Packing, tokens: int, *, first_alone: bool) -> SuffixPacking:
    """The packing of `tokens` suffix tokens per sample, on the device of `packing`, without synchronising it.

    Args:
        packing: Of the prefix.
        tokens: Number of suffix tokens, T.
        first_alone: The first token sees the prefix and itself, the others see all; it is a sequence of its own, with
            its own copy of the keys. Otherwise each sample is one sequence.
    """
    starts = packing.starts.to(torch.int64)
    starts, lengths = starts[:-1], starts.diff()  # Of the samples, then of filler.
    device, batch, rows = starts.device, len(starts) - 1, len(packing.from_grid)
    row, own = torch.arange(rows, device=device), torch.arange(tokens, device=device)
    numbers = torch.arange(batch + 1, device=device)
    sample = torch.searchsorted(starts[1:], row, right=True)  # Of each row; B for filler.
    within = row - starts[sample]
    queries = numbers * tokens
    again: torch.Tensor | None = None
    if not first_alone:
        keys = starts + queries  # Prefix, then all tokens.
        inverse = torch.cat((keys[sample] + within, ((keys + lengths)[:-1, None] + own).flatten()))
        count = rows + batch * tokens
    else:
        # Prefix and first token, then prefix and all tokens; filler, too, is there twice.
        keys = 2 * starts + numbers * (tokens + 1)
        count = 2 * rows + batch * (tokens + 1)
        alone, others = keys + lengths, keys + lengths + (numbers < batch)
        inverse = torch.cat((keys[sample] + within, ((others + lengths)[:-1, None] + own).flatten()))
        once = torch.full((batch, tokens), count - 1, device=device)
        once[:, 0] = alone[:-1]
        again = torch.cat((others[sample] + within, once.flatten()))
        queries = torch.cat((torch.stack((queries, queries + 1), dim=1)[:-1].flatten(), queries[-1:]))
        keys = torch.cat((torch.stack((keys, others), dim=1)[:-1].flatten(), keys[-1:]))
    pool = torch.arange(len(inverse), device=device)
    taken = torch.empty(count, dtype=torch.int64, device=device).scatter_(0, inverse, pool)
    if again is not None:
        taken.scatter_(0, again, pool)
        taken[-1:].fill_(rows - 1)  # Filler; all rows that are taken once were written there.
    return SuffixPacking(taken, inverse, again, _and_end(queries, batch * tokens), _and_end(keys, count))


def _and_end(starts: torch.Tensor, end: int) -> torch.Tensor:
    return torch.cat((starts, starts.new_full((1,), end))).to(torch.int32)


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _filled(size: int, value: int, where: slice | torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """A tensor of `size` times `value`, with `values` at `where`."""
    out = torch.full((size,), value)
    out[where] = values
    return out
