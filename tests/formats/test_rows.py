"""Rows cut out of a packed weight are the rows of the whole weight, to the bit."""

from __future__ import annotations

import pytest
import torch

from gossamer.errors import UnsupportedShapeError
from gossamer.formats import find_format, pack, packing_names, unpack
from gossamer.formats.rows import row_split


def cut(storage: str, shape: tuple[int, int], start: int, stop: int):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    packed = pack(weight, storage)
    part = row_split(packed, start, stop)
    assert part.shape == (stop - start, shape[1])
    assert torch.equal(unpack(part, torch.float32), unpack(packed, torch.float32)[start:stop])
    return packed, part


@pytest.mark.parametrize("storage", packing_names())
@pytest.mark.parametrize(("start", "stop"), [(0, 5), (3, 9), (8, 12), (0, 12)])
def test_rows_of_every_format(storage, start, stop):
    _, part = cut(storage, (12, 256), start, stop)
    assert part.format.removesuffix("-dq") == storage.removesuffix("-dq")
    assert all(tensor.is_contiguous() for tensor in part.tensors.values())
    if part.format == storage and "absmax_offset" not in part.tensors:
        assert part.nbytes == find_format(storage).packed_bytes(*part.shape)


def test_nothing_is_copied_where_the_bytes_are_the_same():
    for storage in ("bf16", "fp8", "int8", "Q8_0", "nf4"):
        packed, part = cut(storage, (12, 256), 3, 9)
        for role, tensor in part.tensors.items():
            assert tensor.untyped_storage().data_ptr() == packed.tensors[role].untyped_storage().data_ptr()


@pytest.mark.parametrize("storage", ["nf4-dq", "fp4-dq"])
def test_compressed_scales_stay_compressed_between_groups(storage):
    # 64 rows of 256 values are 256 blocks: one group
    for start, stop in ((0, 64), (64, 128), (64, 130), (128, 130)):
        assert cut(storage, (130, 256), start, stop)[1].format == storage
    for start, stop in ((0, 63), (1, 64), (64, 129)):
        assert cut(storage, (130, 256), start, stop)[1].format == storage.removesuffix("-dq")


@pytest.mark.parametrize("storage", ["nf4", "fp4", "nf4-dq"])
def test_blocks_that_cross_rows(storage):
    # 96 columns: every second row starts a block; 9 rows end in the middle of one
    for start, stop in ((0, 2), (4, 8), (2, 9), (0, 9)):
        cut(storage, (9, 96), start, stop)
    for start, stop in ((0, 3), (1, 4), (3, 9)):
        with pytest.raises(UnsupportedShapeError, match="run on from row to row"):
            cut(storage, (9, 96), start, stop)
    # an odd number of values: the last byte holds one
    cut(storage, (67, 65), 64, 67)


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (2, 2), (3, 2), (0, 13)])
def test_rows_that_are_not_there(start, stop):
    with pytest.raises(UnsupportedShapeError, match="not there"):
        cut("bf16", (12, 4), start, stop)
