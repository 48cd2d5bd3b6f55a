"""The torch reference of attention with values in eight bits, against SDPA in float64, and its order of keys against
the fragments of tensor cores."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from gossamer.kernels.attention_reference import attend_in_torch, decoded
from gossamer.kernels.attention_values import SMALLEST, key_at_place, row_of_channel, values_in_torch

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
    """e4m3 rounds by 1/16 at most, evenly: 0.026 in the mean square, and both operands of a product sqrt(2) of that."""
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
    values = values_in_torch(v)
    padded = F.pad(v.double(), (0, 0, 0, 84)).flatten(0, 1)
    assert values.exponents[0, 0] == 3
    for block in range(3):
        scale = 2.0 ** values.exponents[:, block].double()[:, None, None]
        tile = padded[:, block * 128 : (block + 1) * 128]
        peak = (tile / scale).abs().amax((1, 2))
        assert ((peak > 224) & (peak <= 448)).all()
        found = decoded(values, block).double()
        assert ((found - tile / scale).abs() <= (tile / scale).abs() / 16 + 2.0**-10).all()


def test_blocks_of_zeros_have_the_smallest_exponent():
    values = values_in_torch(torch.zeros(1, 1, 10, HEAD))
    assert values.exponents.item() == SMALLEST
    assert not values.codes.float().any()


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
