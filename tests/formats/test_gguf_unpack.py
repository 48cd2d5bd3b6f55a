"""Every GGUF type decodes to the bits that the `gguf` package gives."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.errors import InvalidOptionError, UnknownStorageError, UnsupportedShapeError
from gossamer.formats.gguf import BLOCK_TYPES, codec, iq_codebooks, unpack

# MXFP4 and NVFP4 joined the package after its oldest supported version
REFERENCED = [name for name in BLOCK_TYPES if name in GGMLQuantizationType.__members__]
EXTREME_HALVES = (0x0000, 0x8000, 0x0001, 0x83FF, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7E00, 0xFFFF)


def reference(data: np.ndarray, name: str) -> np.ndarray:
    with np.errstate(all="ignore"):
        return quants.dequantize(data, GGMLQuantizationType[name]).astype(np.float32)


def assert_same_bits(ours: torch.Tensor, theirs: np.ndarray) -> None:
    assert ours.dtype == torch.float32
    assert tuple(ours.shape) == theirs.shape
    ours_bits, theirs_bits = ours.numpy().view(np.uint32), np.ascontiguousarray(theirs).view(np.uint32)
    both_nan = np.isnan(ours.numpy()) & np.isnan(theirs)
    assert ((ours_bits == theirs_bits) | both_nan).all()


def assert_decodes_alike(data: np.ndarray, name: str) -> None:
    kind = BLOCK_TYPES[name]
    shape = (*data.shape[:-1], data.shape[-1] // kind.block_bytes * kind.elements)
    assert_same_bits(unpack(torch.from_numpy(data), name, shape), reference(data, name))


def test_every_type_that_the_package_decodes_is_here():
    decodable = {"F32", "F16"} | {kind.name for kind in quants._type_traits}
    assert decodable <= set(BLOCK_TYPES)


@pytest.mark.parametrize("name", REFERENCED)
def test_block_sizes_are_the_package_s(name):
    kind = BLOCK_TYPES[name]
    assert (kind.elements, kind.block_bytes) == gguf.GGML_QUANT_SIZES[GGMLQuantizationType[name]]


@pytest.mark.parametrize("name", REFERENCED)
@given(rows=st.integers(1, 5), blocks=st.integers(1, 4), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_random_bytes(name, rows, blocks, seed):
    size = (rows, blocks * BLOCK_TYPES[name].block_bytes)
    assert_decodes_alike(np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8), name)


@pytest.mark.parametrize("name", REFERENCED)
@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_chosen_bytes(name, data):
    size = BLOCK_TYPES[name].block_bytes
    chosen = data.draw(st.binary(min_size=size, max_size=size))
    assert_decodes_alike(np.frombuffer(chosen, dtype=np.uint8).copy()[None], name)


@pytest.mark.parametrize("name", REFERENCED)
@pytest.mark.parametrize("value", [0x00, 0x55, 0x7F, 0x80, 0xAA, 0xFF])
def test_uniform_bytes(name, value):
    assert_decodes_alike(np.full((2, BLOCK_TYPES[name].block_bytes), value, dtype=np.uint8), name)


@pytest.mark.parametrize("name", REFERENCED)
def test_extreme_numbers_at_every_offset(name):
    """Zero, subnormal, largest, infinite and NaN float16 in each place, so in the scales too wherever they are."""
    size = BLOCK_TYPES[name].block_bytes
    data = np.random.default_rng(0).integers(0, 256, (len(EXTREME_HALVES), size - 1, size), dtype=np.uint8)
    for row, half in enumerate(EXTREME_HALVES):
        for offset in range(size - 1):
            data[row, offset, offset : offset + 2] = half & 255, half >> 8
    assert_decodes_alike(data.reshape(-1, size), name)


@pytest.mark.parametrize("name", REFERENCED)
def test_chunks_join_seamlessly(name, monkeypatch):
    monkeypatch.setattr(codec, "_CPU_CHUNK_ELEMENTS", 3 * BLOCK_TYPES[name].elements)
    size = (5, 2 * BLOCK_TYPES[name].block_bytes)
    assert_decodes_alike(np.random.default_rng(2).integers(0, 256, size, dtype=np.uint8), name)


@pytest.mark.parametrize("name", ["Q4_K", "Q6_K", "Q8_0", "IQ2_XXS"])
def test_a_tensor_of_more_than_one_chunk(name):
    kind = BLOCK_TYPES[name]
    size = (codec._CPU_CHUNK_ELEMENTS // 1024 + 3, 1024 // kind.elements * kind.block_bytes)
    assert_decodes_alike(np.random.default_rng(3).integers(0, 256, size, dtype=np.uint8), name)


@pytest.mark.parametrize("name", REFERENCED)
def test_data_that_is_neither_aligned_nor_contiguous(name):
    kind = BLOCK_TYPES[name]
    wide = torch.from_numpy(np.random.default_rng(4).integers(0, 256, (3, kind.block_bytes + 2), dtype=np.uint8))
    part = wide[:, 1:-1]
    assert_same_bits(unpack(part, name, (3, kind.elements)), reference(part.numpy().copy(), name))
    row = part[0]
    assert_same_bits(unpack(row, name, (1, kind.elements)), reference(row.numpy().copy()[None], name))


@pytest.mark.parametrize("shape", [(256,), (2, 256), (2, 3, 512), (0, 256), (3, 0)])
def test_any_number_of_dimensions(shape):
    data = torch.zeros(torch.Size(shape).numel() // 256 * 144, dtype=torch.uint8)
    assert unpack(data, "Q4_K", shape).shape == shape


@pytest.mark.parametrize("name", REFERENCED)
def test_the_default_dtype_changes_nothing(name):
    kind = BLOCK_TYPES[name]
    data = torch.from_numpy(np.random.default_rng(5).integers(0, 256, (9, kind.block_bytes), dtype=np.uint8))
    expected = unpack(data, name, (9, kind.elements))
    torch.set_default_dtype(torch.bfloat16)
    try:
        iq_codebooks.grid.cache_clear()
        ours = unpack(data, name, (9, kind.elements))
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same_bits(ours, expected.numpy())


def test_code_books_made_in_inference_mode_serve_training_too():
    for table in (iq_codebooks.grid, iq_codebooks.signs, iq_codebooks.parity_signs, iq_codebooks.iq4_values):
        table.cache_clear()
    device = torch.device("cpu")
    with torch.inference_mode():
        made = [
            iq_codebooks.grid("IQ2_XXS", device),
            iq_codebooks.parity_signs(device),
            iq_codebooks.iq4_values(device),
        ]
    assert not any(table.is_inference() for table in made)


def test_mxfp4_by_hand():
    """Scale 2^(127 - 127) = 1; codes 0..15 are the E2M1 values."""
    block = bytes([127]) + bytes(range(16))
    weight = unpack(torch.frombuffer(bytearray(block), dtype=torch.uint8), "MXFP4", (32,))
    assert weight[:16].tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]
    assert weight[16:].tolist() == [0.0] * 16


def test_nvfp4_by_hand():
    """Scales 1, 448, the smallest subnormal 2^-9, and 0x7F, which stands for 0; every code is 1 (value 0.5)."""
    block = bytes([0x38, 0x7E, 0x01, 0x7F]) + bytes([0x11] * 32)
    weight = unpack(torch.frombuffer(bytearray(block), dtype=torch.uint8), "NVFP4", (64,))
    assert weight.view(4, 16).unique(dim=1).flatten().tolist() == [0.5, 224.0, 2.0**-10, 0.0]


def test_unknown_type():
    with pytest.raises(UnknownStorageError, match="Q4_K") as caught:
        unpack(torch.zeros(144, dtype=torch.uint8), "Q4_X", (1, 256))
    assert "Q4_X" in caught.value.what


@pytest.mark.parametrize("length", [0, 143, 145, 288])
def test_wrong_length(length):
    with pytest.raises(UnsupportedShapeError, match="exactly 144 bytes"):
        unpack(torch.zeros(length, dtype=torch.uint8), "Q4_K", (1, 256))


def test_width_that_is_no_multiple_of_the_block():
    with pytest.raises(UnsupportedShapeError, match="blocks of 256"):
        unpack(torch.zeros(144, dtype=torch.uint8), "Q4_K", (2, 128))


@pytest.mark.parametrize("shape", [(), (-1, 256)])
def test_impossible_shapes(shape):
    with pytest.raises(UnsupportedShapeError, match="at least one dimension"):
        unpack(torch.zeros(144, dtype=torch.uint8), "Q4_K", shape)


def test_data_that_is_not_bytes():
    with pytest.raises(InvalidOptionError, match="uint8"):
        unpack(torch.zeros(144), "Q4_K", (1, 256))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", REFERENCED)
def test_cuda_gives_the_same_bits(name):
    kind = BLOCK_TYPES[name]
    data = np.random.default_rng(6).integers(0, 256, (64, 3 * kind.block_bytes), dtype=np.uint8)
    ours = unpack(torch.from_numpy(data).cuda(), name, (64, 3 * kind.elements))
    assert_same_bits(ours.cpu(), reference(data, name))
