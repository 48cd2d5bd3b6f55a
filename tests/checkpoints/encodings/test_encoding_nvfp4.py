"""NVFP4 without a description: what diffusers quantises is decoded to the bit as diffusers does."""

from __future__ import annotations

import pytest
import torch
from diffusers.quantizers.bfl.utils import dequantize_nvfp4, quantize_nvfp4
from tensor_sources import MemorySource

from gossamer.checkpoints.encodings import nvfp4
from gossamer.checkpoints.encodings.stored import CHUNK_VALUES
from gossamer.checkpoints.encodings.tiled_scales import tiled_shape, untile
from gossamer.errors import FileDamagedError


def stored(shape=(24, 64), **more):
    codes, scale, scale_2 = quantize_nvfp4(torch.randn(shape) * 0.02)
    tensors = {"weight": codes, "weight_scale": scale, "weight_scale_2": scale_2, "input_scale": torch.tensor(0.3)}
    return {f"a.{name}": tensor for name, tensor in (tensors | more).items()}


def test_the_same_numbers_as_diffusers():
    tensors = stored()
    source = MemorySource(tensors)
    assert nvfp4.find(source, tensors) == {"a.weight": tuple(tensors)}
    decoded = nvfp4.read(source, "a.weight")
    assert decoded.dtype == torch.float32
    assert torch.equal(decoded, dequantize_nvfp4(*list(tensors.values())[:3]))


def test_a_matrix_of_more_than_one_chunk():
    shape = (3 * CHUNK_VALUES // (2 * 4096), 4096)
    tensors = stored(shape)
    decoded = nvfp4.read(MemorySource(tensors), "a.weight")
    assert torch.equal(decoded, dequantize_nvfp4(*list(tensors.values())[:3]))


def test_every_byte():
    codes = torch.arange(256, dtype=torch.uint8).view(32, 8)
    tensors = {
        "a.weight": codes,
        "a.weight_scale": torch.ones(32, 1).to(torch.float8_e4m3fn),
        "a.weight_scale_2": torch.ones(()),
    }
    decoded = nvfp4.read(MemorySource(tensors), "a.weight").view(256, 2)
    values = [0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]
    assert decoded.tolist() == [[values[byte % 16], values[byte // 16]] for byte in range(256)]


def test_an_input_scale_is_multiplied_into_the_columns():
    scale = torch.rand(64).bfloat16()
    x = torch.randn(5, 64)
    tensors = stored(pre_quant_scale=scale)
    plain = dequantize_nvfp4(*list(tensors.values())[:3])
    decoded = nvfp4.read(MemorySource(tensors), "a.weight")
    torch.testing.assert_close(x @ decoded.T, (x * scale.float()) @ plain.T)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (128, 4), (129, 5), (300, 9), (33, 8)])
def test_tiles_hold_each_scale_where_the_documentation_says(rows, columns):
    padded = tiled_shape(rows, columns)
    line = torch.zeros(padded[0] * padded[1], dtype=torch.int32)
    for row in range(rows):
        for column in range(columns):
            tile = row // 128 * (padded[1] // 4) + column // 4
            line[512 * tile + row % 32 * 16 + row % 128 // 32 * 4 + column % 4] = row * 1000 + column
    rows_and_columns = torch.arange(rows)[:, None] * 1000 + torch.arange(columns)
    assert torch.equal(untile(line, rows, columns), rows_and_columns.int())


NAN = torch.full((24, 4), float("nan"))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"weight_scale": torch.ones(128, 4).to(torch.float8_e4m3fn)}, r"\[128, 4\]; \[24, 4\] was expected"),
        ({"weight_scale": NAN.to(torch.float8_e4m3fn)}, "not finite"),
        ({"weight_scale": torch.ones(24, 4)}, "dtype F32; F8_E4M3"),
        ({"weight_scale_2": torch.ones(2)}, r"\[2\]"),
        ({"weight_scale_2": torch.tensor(float("inf"))}, "not finite"),
        ({"weight": torch.zeros(24, 33, dtype=torch.uint8)}, "66 columns"),
        ({"weight": torch.zeros(24, dtype=torch.uint8)}, "a matrix was expected"),
        ({"weight": torch.zeros(24, 32)}, "dtype F32; U8"),
        ({"pre_quant_scale": torch.ones(63)}, r"\[63\]"),
    ],
)
def test_what_does_not_belong_together_is_refused(change, match):
    with pytest.raises(FileDamagedError, match=match):
        nvfp4.read(MemorySource(stored(**change)), "a.weight")


def test_a_missing_scale():
    tensors = stored()
    del tensors["a.weight_scale"]
    with pytest.raises(FileDamagedError, match=r"'a\.weight_scale' that belongs to it is missing"):
        nvfp4.read(MemorySource(tensors), "a.weight")
