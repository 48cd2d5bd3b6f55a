"""The torch reference of attention in eight bits, against SDPA in float64, and its order of keys against
the fragments of tensor cores."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from gossamer.kernels.attention_codes import (
    BLOCK,
    LOG2_SCALE,
    SMALLEST,
    codes_in_torch,
    key_at_place,
    row_of_channel,
    values_in_torch,
)
from gossamer.kernels.attention_reference import attend_in_torch, decoded

HEAD = 128


def qkv(batch: int, heads: int, tokens: int, sharp: float = 1.0, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(batch, heads, tokens, HEAD, generator=generator).bfloat16() for _ in range(3))
    return [q * sharp, k, v]


def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q.double(), k.double(), v.double())


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize(("tokens", "sharp"), [(1, 1), (63, 1), (128, 1), (129, 1), (333, 1), (333, 12), (700, 3)])
def test_it_is_attention_but_for_the_rounding_of_two_operands(tokens, sharp):
    """e4m3 rounds by 1/16 at most, evenly: 0.026 in the mean square, and both operands of a product sqrt(2) of that. A
    logit of 12 standard deviations is off by 0.1, and with it that much of a probability."""
    q, k, v = qkv(2, 2, tokens, sharp)
    error = relative(attend_in_torch(q, k, v), exact(q, k, v))
    assert 0.01 < error < 0.05


@pytest.mark.parametrize("scale", [2.0**-40, 1e-3, 1.0, 3e4, 2.0**90])
def test_the_size_of_values_does_not_matter(scale):
    q, k, v = qkv(1, 2, 200)
    v = v * scale
    assert relative(attend_in_torch(q, k, v), exact(q, k, v)) < 0.05


def test_blocks_of_very_different_values():
    q, k, v = qkv(1, 1, 512)
    v = v * torch.tensor([1e-4, 1.0, 1e4, 0.0]).repeat_interleave(128)[:, None].bfloat16()
    assert relative(attend_in_torch(q, k, v), exact(q, k, v)) < 0.05


def test_errors_of_single_probabilities_cancel():
    q, k, v = qkv(1, 1, 1000)
    v = torch.ones_like(v)
    assert relative(attend_in_torch(q, k, v), exact(q, k, v)) < 0.002


# values ---------------------------------------------------------------------------------------------------------------


def test_codes_are_the_values_with_the_smallest_exponent_that_holds_them():
    v = qkv(2, 3, 300, seed=1)[2]
    v[0, 0, 5, 7] = 448 * 2.0**3  # the largest code of an exponent
    v8, exponents = values_in_torch(v)
    padded = F.pad(v.double(), (0, 0, 0, 84)).flatten(0, 1)
    assert exponents[0, 0] == 3
    for block in range(3):
        scale = 2.0 ** exponents[:, block].double()[:, None, None]
        tile = padded[:, block * 128 : (block + 1) * 128]
        peak = (tile / scale).abs().amax((1, 2))
        assert ((peak > 224) & (peak <= 448)).all()
        found = decoded(v8, block).double()
        assert ((found - tile / scale).abs() <= (tile / scale).abs() / 16 + 2.0**-10).all()


def test_blocks_of_zeros_have_the_smallest_exponent():
    v8, exponents = values_in_torch(torch.zeros(1, 1, 10, HEAD))
    assert exponents.item() == SMALLEST
    assert not v8.float().any()


# queries and keys -----------------------------------------------------------------------------------------------------


def test_queries_and_keys_are_off_by_half_a_step_at_most():
    q, k, v = qkv(2, 3, 300, seed=2)
    q[0, 0, 5], q[1, 2, 7] = 0, q[1, 2, 7] * 1000
    codes = codes_in_torch(q, k, v)
    q_step = codes.q_scales.double()[..., None] / LOG2_SCALE
    k_step = codes.k_scales.double().repeat_interleave(BLOCK, 1)[:, :300].reshape(2, 3, 300, 1)
    for x, codes8, step in ((q, codes.q8, q_step), (k, codes.k8, k_step)):
        assert ((codes8 * step - x.double()).abs() <= 0.5001 * step).all()
    peaks = codes.q8.int().abs().amax(-1)
    assert peaks[0, 0, 5] == 0
    assert (peaks == 127).sum() == peaks.numel() - 1


def test_a_logit_of_normalised_operands_moves_by_a_hundredth():
    """A step of int8 is 3 to 4 standard deviations over 127: sqrt(1 / 12) of it, for both operands."""
    q, k, v = qkv(1, 2, 512, seed=3)
    codes = codes_in_torch(q, k, v)
    k_scales = codes.k_scales.repeat_interleave(BLOCK, 1).reshape(1, 2, 1, 512)
    found = codes.q8.double() @ codes.k8.double().transpose(-1, -2) * codes.q_scales[..., None] * k_scales
    assert relative(found, q.double() @ k.double().transpose(-1, -2) * LOG2_SCALE) < 0.012


# the order of keys and channels, from the fragments that the PTX ISA gives for wgmma ----------------------------------


def accumulator_column(lane: int, register: int) -> int:
    """Column of register d[register] of a lane in D of wgmma m64nN, float32; columns of one row are 0, 1, 4, 5, ..."""
    return 8 * (register // 4) + 2 * (lane % 4) + register % 2


def operand_column(lane: int, register: int) -> int:
    """Column of 8-bit element a[register] of a lane in A of wgmma m64nNk32 from registers."""
    return 16 * (register // 8) + 4 * (lane % 4) + register % 4


@pytest.mark.parametrize("lane", range(32))
def test_a_lane_multiplies_the_probabilities_that_it_has(lane):
    """Its scores of 32 keys, in their order, stand where A wants the operand: v must hold those keys there."""
    scores = [register for register in range(16) if register % 4 < 2]  # d0 d1 d4 d5 ...: the first row
    operands = [register for register in range(16) if register % 8 < 4]  # a0-a3 a8-a11
    keys = [accumulator_column(lane, register) for register in scores]
    places = [operand_column(lane, register) for register in operands]
    assert key_at_place(torch.tensor(places)).tolist() == keys


@pytest.mark.parametrize("lane", range(4))
def test_a_lane_ends_up_with_eight_neighbouring_channels(lane):
    registers = [register for register in range(16) if register % 4 < 2]
    rows = [accumulator_column(lane, register) for register in registers]
    assert row_of_channel(torch.arange(8 * lane, 8 * lane + 8)).tolist() == rows


def test_both_orders_are_permutations_of_short_runs():
    for order, run in ((key_at_place, 16), (row_of_channel, 32)):
        found = order(torch.arange(128)).reshape(-1, run)
        assert torch.equal(found.sort(1).values, torch.arange(128).reshape(-1, run))


def test_the_scale_is_that_of_attention():
    q, k, v = qkv(1, 1, 2)
    logits = (q.double() @ k.double().transpose(-1, -2) / math.sqrt(HEAD)).softmax(-1)
    v = torch.zeros_like(v)
    v[0, 0, 0, 0] = 1.0
    assert attend_in_torch(q, k, v)[0, 0, :, 0].tolist() == pytest.approx(logits[0, 0, :, 0].tolist(), rel=0.07)
