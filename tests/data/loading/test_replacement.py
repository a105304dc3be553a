"""`data.on_bad_sample = "skip"`: the same rows in place of bad ones, on any ranks, workers and resumes."""

import pytest
from toy_data import Repack, Rows, ToyPolicy

from rlinf_core.data.loading.chunked_sampling import Chunks
from rlinf_core.data.loading.loader import build_train_loader
from rlinf_core.data.loading.mixture import Source
from rlinf_core.data.loading.sampling import Batching
from rlinf_core.data.loading.validation import build_validation_batches
from rlinf_core.data.pipeline import Pipeline
from rlinf_core.data.sample import REPLACED
from rlinf_core.errors import RunError, UserError

BAD = frozenset({2, 5, 17, 25})
ROWS = 28


class Damaged(Rows):
    """Rows of which some cannot be read."""

    bad = BAD

    def __getitems__(self, indices):
        for index in indices:
            if index in self.bad:
                raise UserError(f"row {index} is not an image")
        return super().__getitems__(indices)


def loader(*, rank=0, ranks=1, micro=2, workers=0, start=0, stop=6, skips=True, chunks=None, rows=None):
    return build_train_loader(
        [Source(rows or Damaged(ROWS), Pipeline(Repack()), skips_bad_rows=skips, max_bad_rows=9)],
        ToyPolicy(),
        Batching(12, micro, 3, rank, ranks),
        (start, stop),
        num_workers=workers,
        chunks=chunks,
    )


def steps(ranks=1, *, start=0, micro=2, **options):
    """Step -> (rows in use with their noise, replaced rows), over all ranks."""
    seen = {}
    for rank in range(ranks):
        for number, batch in enumerate(loader(rank=rank, ranks=ranks, start=start, micro=micro, **options)):
            rows, replaced = seen.setdefault(start + number // (12 // (ranks * micro)), (set(), set()))
            rows |= {(index, tuple(map(tuple, noise))) for index, noise in zip(*values(batch), strict=True)}
            replaced |= {(one.row, one.by) for one in batch.get(REPLACED, ())}
    return seen


def values(batch):
    noise = batch["noise"].reshape(len(batch["index"]), 1, -1)
    return batch["index"].tolist(), noise.tolist()


CHUNKED = Chunks(streams=4, frames=4, buffer=16)


@pytest.mark.parametrize("chunks", [None, CHUNKED], ids=["random", "chunked"])
def test_replacements_do_not_depend_on_ranks_workers_or_where_a_run_continues(chunks):
    one = steps(chunks=chunks)
    replaced = set().union(*(found for _, found in one.values()))
    assert {row for row, _ in replaced} == BAD
    assert not {by for _, by in replaced} & BAD
    assert not {index for rows, _ in one.values() for index, _ in rows} & BAD
    assert steps(2, chunks=chunks) == one
    assert steps(2, micro=3, chunks=chunks) == one
    assert steps(workers=2, chunks=chunks) == one
    assert steps(start=4, chunks=chunks) == {step: one[step] for step in (4, 5)}


def test_each_epoch_replaces_by_other_rows():
    found = {step: dict(replaced) for step, (_, replaced) in steps(stop=40).items()}
    used = {row: {by[row] for by in found.values() if row in by} for row in BAD}
    assert all(len(by) > 3 for by in used.values())


@pytest.mark.parametrize("chunks", [None, CHUNKED], ids=["random", "chunked"])
def test_by_default_a_bad_row_ends_the_run(chunks):
    with pytest.raises(UserError, match=r"row \d+ is not an image \[toy, part-0"):
        list(loader(skips=False, chunks=chunks))


def test_data_that_are_bad_throughout_end_the_run():
    rows = Damaged(ROWS)
    rows.bad = range(ROWS)
    with pytest.raises(UserError, match="20 other rows of the dataset that were tried instead"):
        list(loader(rows=rows))


def test_storage_that_is_away_makes_no_row_bad():
    class Away(Damaged):
        def __getitems__(self, indices):
            raise RunError("the storage is away")

    with pytest.raises(RunError, match="away"):
        list(loader(rows=Away(ROWS)))


def test_validation_uses_another_held_out_row(capsys):
    source = Source(Damaged(ROWS), Pipeline(Repack()), skips_bad_rows=True)
    options = {"seed": 3, "val_samples": ROWS, "micro_batch_size": 4, "rank": 0, "world_size": 1}
    batches = list(build_validation_batches(source, ToyPolicy(), **options))
    rows = [row.row for batch in batches for row in batch.rows]
    assert len(rows) == ROWS
    assert not set(rows) & BAD
    assert [row for batch in batches for row in batch.batch["index"].tolist()] == rows
    assert capsys.readouterr().err.count("a held-out row was replaced by toy") == len(BAD)
