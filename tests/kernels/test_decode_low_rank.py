"""Stacking low-rank terms, and the torch reference of decoding with its row scales."""

from __future__ import annotations

import pytest
import torch

from gossamer.errors import AdapterError
from gossamer.formats import pack, unpack
from gossamer.kernels.decode_reference import decode_in_torch, measure_row_scale_in_torch, round_to, row_scales
from gossamer.kernels.low_rank import delta, powers, rank_step, set_scales, stack_terms


def term(rank: int, scale: float = 1.0, dtype: torch.dtype = torch.float32, rows: int = 5, columns: int = 12):
    generator = torch.Generator().manual_seed(rank)
    up, down = torch.randn(rows, rank, generator=generator), torch.randn(rank, columns, generator=generator)
    return up.to(dtype), down.to(dtype), scale


def test_the_stack_is_the_sum_of_the_terms():
    terms = [term(3, 0.5), term(16, -2.0), term(1, 3.0)]
    stacked = stack_terms(terms)
    expected = sum(scale * up @ down for up, down, scale in terms)
    torch.testing.assert_close(delta(stacked), expected, rtol=1e-5, atol=1e-5)
    assert stacked.ranks == (3, 16, 1)
    assert stacked.up.shape[1] == stacked.down.shape[0] == 32
    assert stacked.shape == (5, 12)


@pytest.mark.parametrize(("rank", "padded"), [(1, 16), (16, 16), (17, 32), (33, 64), (64, 64), (65, 128), (130, 192)])
def test_ranks_are_padded_to_what_the_kernels_take_at_a_time(rank, padded):
    assert stack_terms([term(rank)]).up.shape == (5, padded)
    assert padded % rank_step(padded) == 0


def test_padding_is_zero_whatever_the_scales():
    stacked = stack_terms([term(3)])
    assert (stacked.up[:, 3:] == 0).all()
    assert (stacked.down[3:] == 0).all()
    assert (stacked.scale[3:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_power_of_a_rank_is_that_of_its_largest_value(dtype):
    down = torch.tensor([[[0.3, -5.0], [0.25, 0.1]], [[0.0, 0.0], [1.0, torch.nan]]]).to(dtype)
    assert powers(down).tolist() == [[4.0, 0.25], [2.0**-126, torch.inf]]
    stacked = stack_terms([term(3)])
    assert ((stacked.down.abs().amax(1) / stacked.power)[:3] >= 1).all()
    assert ((stacked.down.abs().amax(1) / stacked.power) < 2).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_common_type_is_kept_and_mixed_ones_become_float32(dtype):
    assert stack_terms([term(2, dtype=dtype), term(3, dtype=dtype)]).up.dtype == dtype
    assert stack_terms([term(2, dtype=torch.float16), term(3, dtype=torch.bfloat16)]).up.dtype == torch.float32
    assert stack_terms([term(2, dtype=torch.float64)]).down.dtype == torch.float32
    assert stack_terms([term(2, dtype=dtype)], torch.float16).down.dtype == torch.float16


def test_scales_change_without_stacking_again():
    terms = [term(2), term(4)]
    stacked = stack_terms(terms)
    address = stacked.scale.data_ptr()
    set_scales(stacked, [0.0, -1.5])
    torch.testing.assert_close(delta(stacked), -1.5 * terms[1][0] @ terms[1][1], rtol=1e-5, atol=1e-5)
    assert stacked.scale.data_ptr() == address
    with pytest.raises(AdapterError, match="1 scales were given for 2"):
        set_scales(stacked, [1.0])


@pytest.mark.parametrize("terms", [[], [term(2), term(2, rows=6)], [(torch.ones(3, 2), torch.ones(4, 5), 1.0)]])
def test_terms_of_different_layers_are_refused(terms):
    with pytest.raises(AdapterError, match="cannot be stacked"):
        stack_terms(terms)


@pytest.mark.parametrize(("dtype", "storage"), [(torch.float8_e4m3fn, "fp8"), (torch.int8, "int8")])
def test_the_reference_agrees_with_the_storage_format_of_the_same_type(dtype, storage):
    weight = torch.randn(9, 256, generator=torch.Generator().manual_seed(0)) * 0.02
    weight[3] = 0
    stored = pack(weight, storage)
    scale, out = torch.empty(9), torch.empty(9, 256, dtype=dtype)
    plain = pack(weight, "fp32")
    measure_row_scale_in_torch(plain, scale, dtype, 256)
    decode_in_torch(plain, out, None, scale)
    assert torch.equal(scale, stored.tensors["scale"])
    # a product with the reciprocal may round to the neighbouring code where the quotient is on a boundary
    same = out.view(torch.uint8) == stored.tensors["codes"].view(torch.uint8)
    assert same.float().mean() > 0.999


def test_eight_bit_codes_without_a_scale_are_a_mistake_of_the_caller():
    with pytest.raises(ValueError, match="row scale"):
        round_to(torch.ones(2, 2), torch.int8)


def test_scales_of_rows_without_a_normal_scale_are_one():
    weight = torch.tensor([[0.0, 0.0], [1e-40, 0.0], [448.0, 1.0]])
    assert row_scales(weight, torch.float8_e4m3fn).tolist() == [1.0, 1.0, 1.0]


def test_wider_outputs_get_zero_columns():
    packed, out = pack(torch.ones(2, 64), "nf4"), torch.full((2, 80), float("nan"))
    decode_in_torch(packed, out)
    assert torch.equal(out[:, :64], unpack(packed, torch.float32))
    assert (out[:, 64:] == 0).all()
