"""Rows of packed weights, put together: the numbers of the decoded weight's rows, or an error that says why."""

from __future__ import annotations

import pytest
import torch

from gossamer.checkpoints.rows import join_rows, take_rows
from gossamer.errors import UnsupportedShapeError
from gossamer.formats import pack, unpack
from gossamer.formats.rows import row_split

WIDTH = 256  # 64 rows fill a group of 256 block scales


def weight(rows, seed=0, width=WIDTH):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * (1 + seed)


def decoded(packed):
    return unpack(packed, torch.float32)


def require_rows(packed, ranges, storage):
    taken = take_rows(packed, ranges)
    assert taken.format == storage
    assert torch.equal(decoded(taken), torch.cat([decoded(packed)[start:stop] for start, stop in ranges]))


@pytest.mark.parametrize("storage", ["fp32", "bf16", "fp8", "fp8_e5m2", "int8", "nf4", "fp4", "Q8_0", "Q4_K"])
def test_rows_in_another_order(storage):
    require_rows(pack(weight(12), storage), [(8, 12), (0, 3), (5, 6)], storage)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize(
    ("rows", "ranges", "suffix"),
    [
        (128, [(64, 128), (0, 64)], "-dq"),
        (160, [(64, 128), (128, 160)], "-dq"),
        (160, [(128, 160), (0, 64)], ""),  # the last group is a short one, and nothing may follow it
        (160, [(64, 128), (0, 32)], ""),  # the second part ends within a group, so it has plain scales
        (160, [(0, 32), (64, 128)], ""),
        (160, [(32, 64), (0, 32)], ""),
    ],
)
def test_groups_of_block_scales_stay_where_they_can(kind, rows, ranges, suffix):
    require_rows(pack(weight(rows), f"{kind}-dq"), ranges, kind + suffix)


def test_parts_of_two_weights():
    """Their block scales are counted from means of their own."""
    parts = [pack(weight(64, seed), "nf4-dq") for seed in (0, 1)]
    joined = join_rows(parts)
    assert joined.format == "nf4"
    assert torch.equal(decoded(joined), torch.cat([decoded(part) for part in parts]))


@pytest.mark.parametrize("storages", [("nf4", "int8"), ("int8", "nf4-dq"), ("nf4", "fp4"), ("fp32", "fp8")])
def test_parts_of_other_formats_are_refused(storages):
    with pytest.raises(UnsupportedShapeError, match=f"{storages[0]} of 256 columns, {storages[1]} of 256") as caught:
        join_rows([pack(weight(64), storage) for storage in storages])
    assert all((caught.value.what, caught.value.why, caught.value.next_step))


def test_parts_of_other_widths_are_refused():
    with pytest.raises(UnsupportedShapeError, match="nf4 of 256 columns, nf4 of 128 columns cannot become one weight"):
        join_rows([pack(weight(4), "nf4"), pack(weight(8, width=128), "nf4")])


def test_a_block_that_lies_in_two_parts_is_refused():
    with pytest.raises(UnsupportedShapeError, match="Parts of a nf4 weight of 96 columns cannot change places"):
        join_rows([pack(weight(1, width=96), "nf4"), row_split(pack(weight(4, width=96), "nf4"), 2, 4)])
