"""GGUF types as storage formats: the record, its exact size, its dtype and its device."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gossamer.errors import GossamerError, InvalidOptionError, UnsupportedShapeError
from gossamer.formats.gguf import BLOCK_TYPES, FORMATS, unpack
from gossamer.formats.packed import Packed

BY_NAME = {fmt.name: fmt for fmt in FORMATS}
PACKABLE = [name for name in BY_NAME if BLOCK_TYPES[name].encode is not None]
WEIGHT = torch.from_numpy(np.random.default_rng(0).standard_normal((6, 512)).astype(np.float32) * 0.02)


def test_every_block_type_is_a_format():
    assert set(BY_NAME) == set(BLOCK_TYPES) - {"F32", "F16", "BF16"}
    assert {"Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K"} <= set(PACKABLE)


@pytest.mark.parametrize("name", PACKABLE)
def test_packed_record(name):
    fmt = BY_NAME[name]
    packed = fmt.pack(WEIGHT)
    assert (packed.format, packed.shape, list(packed.tensors)) == (name, (6, 512), ["blocks"])
    assert packed.tensors["blocks"].dtype == torch.uint8
    assert packed.tensors["blocks"].shape == (6, BLOCK_TYPES[name].row_bytes(512))
    assert packed.nbytes == fmt.packed_bytes(6, 512)


@pytest.mark.parametrize("name", PACKABLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_unpack_rounds_once_from_float32(name, dtype):
    packed = BY_NAME[name].pack(WEIGHT)
    decoded = BY_NAME[name].unpack(packed, dtype)
    assert decoded.dtype == dtype
    assert torch.equal(decoded, unpack(packed.tensors["blocks"], name, (6, 512)).to(dtype))


@pytest.mark.parametrize("name", list(BY_NAME))
def test_weights_from_files_stay_in_their_type(name):
    kind = BLOCK_TYPES[name]
    width = 2 * kind.elements
    data = torch.zeros(3, kind.row_bytes(width), dtype=torch.uint8)
    packed = Packed(name, {"blocks": data}, (3, width))
    assert torch.equal(BY_NAME[name].unpack(packed, torch.float32), unpack(data, name, (3, width)))
    assert packed.nbytes == BY_NAME[name].packed_bytes(3, width)


@pytest.mark.parametrize("name", list(BY_NAME))
def test_width_multiple_is_the_block(name):
    fmt = BY_NAME[name]
    assert fmt.width_multiple == BLOCK_TYPES[name].elements
    with pytest.raises(UnsupportedShapeError):
        fmt.packed_bytes(4, fmt.width_multiple + 1)


@pytest.mark.parametrize("name", sorted(set(BY_NAME) - set(PACKABLE)))
def test_formats_that_can_only_be_read(name):
    with pytest.raises(InvalidOptionError) as caught:
        BY_NAME[name].pack(WEIGHT)
    assert isinstance(caught.value, GossamerError)
    assert name in caught.value.what
    assert caught.value.why
    assert "Q4_K" in caught.value.next_step
