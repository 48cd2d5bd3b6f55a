"""The torch references of the pointwise functions, against diffusers and against their own formulas."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.normalization import AdaLayerNormContinuous, AdaLayerNormZeroSingle
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from gossamer.errors import InvalidOptionError, UnsupportedShapeError
from gossamer.kernels.pointwise import (
    HeadNorm,
    Modulation,
    Rotation,
    TextNorm,
    gelu_concat,
    gelu_rows,
    norm_modulate,
    qk_norm_rope_,
    quantize_rows,
    rescale_product,
    residual_gate_,
    residual_gate_norm_modulate_,
)
from gossamer.kernels.pointwise.rows import LARGEST_CODE

CODES = list(LARGEST_CODE)
HALVES = [torch.bfloat16, torch.float16]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_norm_and_modulation_are_those_of_diffusers_bit_for_bit():
    x, conditioning = normal(2, 5, 64), normal(2, 64, seed=1)
    zero = AdaLayerNormZeroSingle(64)
    expected, _ = zero(x, emb=conditioning)
    shift, scale, _ = zero.linear(F.silu(conditioning)).chunk(3, dim=1)
    assert torch.equal(norm_modulate(x, Modulation(scale, shift), torch.float32).values, expected)
    last = AdaLayerNormContinuous(64, 64, elementwise_affine=False, eps=1e-6)
    scale, shift = last.linear(F.silu(conditioning)).chunk(2, dim=1)
    assert torch.equal(norm_modulate(x, Modulation(scale, shift), torch.float32).values, last(x, conditioning))


@pytest.mark.parametrize("text_tokens", [None, 0, 3, 7])
def test_queries_and_keys_are_those_of_diffusers_bit_for_bit(text_tokens):
    qkv, cos, sin = normal(2, 7, 3 * 4 * 32), normal(7, 16, seed=1), normal(7, 16, seed=2)
    image, text = (HeadNorm(normal(32, seed=seed), normal(32, seed=seed + 1)) for seed in (3, 5))
    twice = cos.repeat_interleave(2, dim=1), sin.repeat_interleave(2, dim=1)
    cut = text_tokens or 0
    expected = []
    for part, weight in enumerate(("query", "key")):
        norms = [nn.RMSNorm(32, eps=1e-6) for _ in range(2)]
        norms[0].weight.data, norms[1].weight.data = getattr(text, weight), getattr(image, weight)
        heads = qkv.unflatten(-1, (3, 4, 32))[:, :, part]
        normed = torch.cat((norms[0](heads[:, :cut]), norms[1](heads[:, cut:])), dim=1)
        expected.append(apply_rotary_emb(normed, twice, sequence_dim=1))
    expected.append(qkv.unflatten(-1, (3, 4, 32))[:, :, 2])
    own = TextNorm(text_tokens, text) if text_tokens is not None else None
    found = qk_norm_rope_(qkv.clone(), Rotation(cos, sin), image, own)
    assert torch.equal(found, torch.stack(expected, dim=2).flatten(2))


def test_a_view_into_a_wider_buffer_is_changed_in_place_and_nothing_around_it():
    buffer, rotation = normal(2, 5, 3 * 32 + 40), Rotation(normal(5, 8, seed=1), normal(5, 8, seed=2))
    norm = HeadNorm(normal(16, seed=3), normal(16, seed=4))
    whole = buffer.clone()
    expected = qk_norm_rope_(buffer[..., :96].clone(), rotation, norm)
    qk_norm_rope_(buffer[..., :96], rotation, norm)
    assert torch.equal(buffer[..., :96], expected)
    assert torch.equal(buffer[..., 64:], whole[..., 64:])


def test_a_rotation_of_other_tokens_is_refused():
    rotation = Rotation(normal(4, 8), normal(4, 8))
    norm = HeadNorm(torch.ones(16), torch.ones(16))
    with pytest.raises(UnsupportedShapeError, match=r"cannot be rotated"):
        qk_norm_rope_(normal(1, 5, 96), rotation, norm)
    with pytest.raises(UnsupportedShapeError, match=r"cannot be rotated"):
        qk_norm_rope_(normal(1, 4, 100), rotation, norm)


def test_gelu_is_torchs_and_stands_behind_the_attention_output():
    attention, mlp = normal(2, 5, 32), normal(2, 5, 128, seed=1) * 4
    activated = F.gelu(mlp, approximate="tanh")
    assert torch.equal(gelu_rows(mlp, torch.float32).values, activated)
    joined = gelu_concat(attention, mlp, torch.float32).values
    assert torch.equal(joined, torch.cat((attention, activated), dim=-1))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_the_residual_is_added_in_place_and_rounded_once(dtype):
    x, y, gate = normal(2, 5, 64, dtype=dtype), normal(2, 5, 64, seed=1, dtype=dtype), normal(2, 64, seed=2)
    expected = (x.double() + gate.double()[:, None] * y.double()).float().to(dtype)
    out = residual_gate_(x, gate, y)
    assert out is x
    torch.testing.assert_close(x, expected, rtol=1e-6 if dtype == torch.float32 else 0.0, atol=1e-6)


def test_a_float16_residual_saturates_and_keeps_nan():
    x = torch.tensor([[[60000.0, -60000.0, math.nan, 1.0]]], dtype=torch.float16)
    residual_gate_(x, torch.ones(1, 4), x.clone())
    assert x[0, 0, :2].tolist() == [65504.0, -65504.0]
    assert x[0, 0, 2].isnan()
    assert x[0, 0, 3] == 2


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_the_fused_function_is_the_two_others_one_after_the_other(dtype):
    x, y = normal(2, 5, 64, dtype=dtype), normal(2, 5, 64, seed=1, dtype=dtype)
    gate, scale, shift = normal(3, 2, 64, seed=2)
    by, cut = Modulation(scale, shift), x.clone()
    fused = residual_gate_norm_modulate_(x, gate, y, by, torch.int8)
    apart = norm_modulate(residual_gate_(cut, gate, y), by, torch.int8)
    assert torch.equal(x, cut)
    assert torch.equal(fused.values, apart.values)
    assert torch.equal(fused.scale, apart.scale)


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_rows_are_rounded_once(dtype):
    """No further from float64 than half a step: computing in float32 costs far less than the rounding."""
    x, by = normal(2, 5, 64, dtype=dtype), Modulation(normal(2, 64, seed=1), normal(2, 64, seed=2))
    wide = F.layer_norm(x.double(), (64,), eps=1e-6) * (1 + by.scale.double()[:, None]) + by.shift.double()[:, None]
    error = (norm_modulate(x, by, dtype).values.double() - wide).abs()
    assert (error <= wide.abs() * torch.finfo(dtype).eps * 0.5001 + 1e-6).all()


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(CODES),
    rows=st.lists(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=7, max_size=7), min_size=1, max_size=4),
)
def test_a_code_is_within_half_a_step_of_its_value(dtype, rows):
    x = torch.tensor(rows)
    found = quantize_rows(x, dtype)
    largest = LARGEST_CODE[dtype]
    assert found.values.dtype == dtype
    assert found.scale.dtype == torch.float32
    assert found.values.float().abs().max() <= largest
    # half a step of e4m3: 2^-4 of the value, or 2^-10 among the subnormal codes
    step = found.scale[:, None] * (0.5 if dtype == torch.int8 else 2.0**-10)
    relative = 0.0 if dtype == torch.int8 else 2.0**-4
    bound = torch.maximum(step, relative * x.abs()) * 1.0001
    assert ((found.dequantize().double() - x.double()).abs() <= bound).all()


@pytest.mark.parametrize("dtype", CODES)
def test_the_largest_value_of_a_row_gets_the_largest_code_and_zeros_stay_zero(dtype):
    x = torch.stack((normal(33), torch.zeros(33), normal(33, seed=1) * 1e-4))
    found = quantize_rows(x, dtype)
    peaks = found.values.float().abs().amax(dim=1)
    assert peaks.tolist() == [LARGEST_CODE[dtype], 0.0, LARGEST_CODE[dtype]]
    assert torch.equal(found.dequantize()[1], torch.zeros(33))
    assert found.scale.isfinite().all()


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_no_code_hides_a_nan_or_an_infinity(dtype, bad):
    x = normal(3, 16)
    x[1, 5] = bad
    found = quantize_rows(x, dtype)
    assert found.scale.isfinite().tolist() == [True, False, True]
    assert not found.dequantize()[1].isfinite().any()


def test_plain_rows_have_no_scale_and_other_types_are_refused():
    x = normal(3, 16)
    for dtype in (torch.float32, *HALVES):
        found = quantize_rows(x, dtype)
        assert found.scale is None
        assert torch.equal(found.values, x.to(dtype))
        assert torch.equal(found.dequantize(), x.to(dtype).float())
    with pytest.raises(InvalidOptionError, match="float8_e5m2"):
        quantize_rows(x, torch.float8_e5m2)


@pytest.mark.parametrize("bias", [None, normal(24, seed=9)])
def test_an_int8_product_with_its_scales_is_the_product_of_the_values(bias):
    x, weight = normal(9, 64), normal(24, 64, seed=1)
    rows, columns = quantize_rows(x, torch.int8), quantize_rows(weight, torch.int8)
    product = (rows.values.long() @ columns.values.long().T).int()
    found = rescale_product(product, rows.scale, columns.scale, bias, torch.float32)
    torch.testing.assert_close(found, F.linear(rows.dequantize(), columns.dequantize(), bias), rtol=1e-5, atol=1e-5)


def test_torch_compile_sees_one_graph():
    x, y = normal(2, 5, 64), normal(2, 5, 64, seed=1)
    gate, scale, shift = normal(3, 2, 64, seed=2)

    def step(x: torch.Tensor) -> torch.Tensor:
        return residual_gate_norm_modulate_(x, gate, y, Modulation(scale, shift), torch.int8).dequantize()

    expected = step(x.clone())
    assert torch.equal(torch.compile(step, fullgraph=True, backend="eager")(x.clone()), expected)
